"""What else there is: torch's attention by each backend of the device, FlexAttention, gathering by hand."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest
from torch.nn.functional import scaled_dot_product_attention as sdpa

from farspan.attention.ops.block_sparse.flex import compiled
from farspan.attention.selection import BlockIndex, TokenIndex

_BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
said: set[str] = set()  # what was found missing, for the caller to print


def sdpa_runs(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool
) -> Iterator[tuple[str, Callable[[], Tensor], float]]:
    """(name, run, bytes allocated at its peak) of every backend of the device that takes such inputs.

    A backend that does not know grouped heads gets K and V expanded beforehand, which is not timed.
    """
    if q.device.type == "cpu":
        yield "sdpa", lambda: sdpa(q, k, v, is_causal=causal, enable_gqa=True), 0
        return
    group = q.shape[1] // k.shape[1]
    wide: list[Tensor] = []  # made when first asked for
    expanded = group * (k.nbytes + v.nbytes)
    logits = 16.0 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]  # float32, some copies

    for name, backend in _BACKENDS.items():
        need = logits + expanded if backend == SDPBackend.MATH else 0
        if _serves(backend, q.dtype, q.shape[1], k.shape[1], q.shape[3], q.shape[2] == 1, causal):

            def run(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return sdpa(q, k, v, is_causal=causal, enable_gqa=True)

            yield name, run, need
        elif _serves(backend, q.dtype, q.shape[1], q.shape[1], q.shape[3], q.shape[2] == 1, causal):

            def run_wide(backend: SDPBackend = backend) -> Tensor:
                if not wide:
                    wide.extend(x.repeat_interleave(group, 1) for x in (k, v))
                with sdpa_kernel(backend):
                    return sdpa(q, wide[0], wide[1], is_causal=causal)

            yield f"{name}, K and V expanded before", run_wide, need + expanded
        else:
            said.add(f"{name} does not take these inputs on this device ({q.dtype}, D {q.shape[3]})")


@functools.cache
def _serves(
    backend: SDPBackend, dtype: torch.dtype, heads: int, kv_heads: int, d: int, one: bool, causal: bool
) -> bool:
    """Whether a backend takes such inputs, tried on short ones."""
    q = torch.randn(1, heads, 1 if one else 256, d, device="cuda", dtype=dtype)
    k = torch.randn(1, kv_heads, 256, d, device="cuda", dtype=dtype)
    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")  # of why it does not
        try:
            sdpa(q, k, k, is_causal=causal, enable_gqa=heads != kv_heads)
        except RuntimeError:
            return False
    return True


def fla_is_there() -> bool:
    """Whether flash-linear-attention is installed."""
    found = importlib.util.find_spec("fla") is not None
    if not found:
        said.add("flash-linear-attention is not installed")
    return found


def flex_run(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, scale: float) -> Callable[[], Any]:
    """FlexAttention over the same blocks, compiled; its BlockMask is made at the first call and kept."""
    how: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if q.device.type == "cuda":
        how["return_aux"] = AuxRequest(lse=True)
        if index.block_q < 128:  # the tile it would take on Hopper holds 128 queries, and it then refuses
            how["kernel_options"] = {"BLOCK_M": index.block_q, "BLOCK_N": min(64, index.block_k)}
            how["kernel_options"]["num_warps"] = 4

    def run() -> Any:
        if "block_mask" not in how:
            how["block_mask"] = index.to_block_mask(q.shape[2], k.shape[2], q.shape[1], transposed=False)
        return compiled()(q, k, v, **how)

    return run


def gathered_prefill(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, counts: list[int]) -> Tensor:
    """Per query block: its blocks of K and V gathered, expanded to the query heads, torch's attention.

    q [1, H, T, D]; ``index`` has one row per KV head, no padding, the same ``counts`` [Nq] in each, the own
    block last.
    """
    size, group = index.block_q, q.shape[1] // k.shape[1]
    place = torch.arange(size, device=q.device)
    out = torch.empty_like(q)
    for n, count in enumerate(counts):
        rows = slice(n * size, (n + 1) * size)
        keys = (index.blocks[:, :, n, :count, None].long() * size + place).flatten(2)[..., None]
        chosen = (x.gather(2, keys.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
        key, value = (x.repeat_interleave(group, 1) for x in chosen)
        mask = torch.ones(size, count * size, dtype=torch.bool, device=q.device)
        mask[:, -size:].tril_()
        out[:, :, rows] = sdpa(q[:, :, rows], key, value, attn_mask=mask)
    return out


def gathered_decode(q: Tensor, k: Tensor, v: Tensor, index: TokenIndex) -> Tensor:
    """The rows of K and V gathered, expanded to the query heads, torch's attention. index [B, Hkv, 1, K]."""
    rows = index.tokens.transpose(2, 3)  # [B, Hkv, K, 1]
    group = q.shape[1] // k.shape[1]
    chosen = (x.gather(2, rows.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
    key, value = (x.repeat_interleave(group, 1) for x in chosen)
    return sdpa(q, key, value)
