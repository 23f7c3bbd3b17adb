"""torch's own attention kernels with their log-sum-exp, for equal numbers of query and KV heads.

What the library does best is not rewritten: on the CPU the flash kernel behind
``scaled_dot_product_attention`` (in bfloat16, its matrix products: products.py), on CUDA the kernel that
``backends.choose`` names. Where none can run (soft-cap, an input that needs gradients, other devices) the
same definition is computed in float32 over tiles of queries and keys, so that memory stays bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv import KV
from ..offloaded import Offloaded
from ..partial import Partial, empty_partial, merge
from ..softmax import Softmax
from . import backends, products
from .dispatch import took
from .torch_private import cudnn_attention, efficient_attention, flash_attention_cpu, flash_attention_cuda

_FEW_KEYS = 2048  # causal rows that see fewer keys gain nothing by products, nor do narrow heads
_ROWS, _COLS = 512, 4096  # tile of the math path: at most 8 MiB of float32 logits per head
_DEVICE = 1 << 25  # logits of a tile there on other devices, over all heads: few keys are few launches


def attend(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    wide: bool = False,
) -> Partial:
    """Attention of q [B, H, Tq, D] over the keys and values ``kv`` of as many heads [B, H, Tk] (views with
    stride 0 are welcome, no copy is made).

    causal: row i sees keys 0 .. i (only for Tq = Tk). mask: boolean, broadcastable to [B, H, Tq, M], True =
    read, for the last M keys; every row reads those before. wide: the output in float32 (float64 for float64
    q), so that what is merged with it is rounded once.
    """
    if kv.streams:
        return kv.attend(q, softmax, causal=causal, mask=mask, wide=wide)
    kind = torch.promote_types(q.dtype, torch.float32) if wide else q.dtype
    if isinstance(kv, Offloaded):
        merged = _by_block(q, kv.on_device() if causal else kv, softmax, causal=causal, mask=mask, wide=wide)
        return Partial(merged.out.to(kind), merged.lse)
    k, v = kv.dense()
    scale, softcap = softmax.scale, softmax.softcap
    if q.shape[2] == 0 or k.shape[2] == 0:
        return empty_partial(q.to(kind), v.shape[-1])
    needs_grad = _needs_grad(q, k, v)
    one_kind = not (causal and mask is not None)  # the products can only hide keys
    if q.device.type == "cpu" and not needs_grad and one_kind and products.serves(q, k, scale):
        if not causal or softcap is not None:
            return products.attend(q, k, v, softmax, causal=causal, mask=mask, dtype=kind)
        if q.shape[2] > _FEW_KEYS and q.shape[3] >= products.NARROW:
            few = _FEW_KEYS
            q_few, k_few, v_few = (x[:, :, :few].to(kind) for x in (q, k, v))
            first = _cpu(q_few, k_few, v_few, scale, True, None)
            rest = products.attend(q, k, v, softmax, causal=True, mask=None, first=few, dtype=kind)
            return Partial(torch.cat([first.out, rest.out], 2), torch.cat([first.lse, rest.lse], 2))
    q, k, v = (x.to(kind) for x in (q, k, v))
    if mask is not None and mask.shape[-1] < k.shape[2]:
        mask = torch.nn.functional.pad(mask, (k.shape[2] - mask.shape[-1], 0), value=True)
    if q.device.type == "cuda":
        part = _cuda(q, k, v, softmax, causal=causal, mask=mask)
        if part is not None:
            return part
        took("math")
    if (
        softcap is None
        and not needs_grad
        and v.shape[-1] == q.shape[-1]
        and q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16, torch.float64)
    ):
        return _cpu(q, k, v, scale, causal, mask)
    return math(q, k, v, softmax, causal=causal, mask=mask)


def _by_block(
    q: Tensor, kv: KV, softmax: Softmax, *, causal: bool, mask: Tensor | None, wide: bool
) -> Partial:
    """``attend``, over a part of ``kv`` at a time."""
    whole, begin = None, 0
    plain = kv.length - (0 if mask is None else mask.shape[-1])  # keys that every row reads
    for block in kv.blocks():
        end = begin + block.length
        its = None if mask is None or end <= plain else mask[..., max(0, begin - plain) : end - plain]
        part = attend(q, block, softmax, causal=causal, mask=its, wide=wide)
        whole, begin = part if whole is None else merge(whole, part), end
    assert whole is not None
    return whole


def causal_of_groups(q: Tensor, kv: KV, softmax: Softmax) -> Partial | None:
    """Causal attention of q [B, H, T, D] over kv [B, Hkv, T], of which each head serves a group of query
    heads, by one kernel of torch for CUDA. None where none of them serves the arguments."""
    return None if kv.streams else _cuda(q, *kv.on_device().dense(), softmax, causal=True, mask=None)


def serves_groups(q: Tensor, kv: KV, softmax: Softmax) -> bool:
    """Whether ``causal_of_groups`` serves the arguments better than a Triton kernel would: never off CUDA."""
    on_cuda = q.device.type == "cuda" and not kv.streams
    return on_cuda and _backend(q, *kv.dense(), softmax, causal=True, mask=None) not in ("efficient", "math")


def _backend(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, causal: bool, mask: Tensor | None) -> str:
    """The kernel of torch for CUDA, one of ``backends.choose``."""
    if softmax.softcap is not None or _needs_grad(q, k, v) or q.shape[2] == 0 or k.shape[2] == 0:
        return "math"
    call = backends.Call(
        dtype=q.dtype,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        keys=k.shape[2],
        causal=causal,
        masked=mask is not None,
        grouped=q.shape[1] != k.shape[1],
    )
    return backends.choose(call, backends.Machine.of(q.device))


def _cuda(
    q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, causal: bool, mask: Tensor | None
) -> Partial | None:
    """Attention by one kernel of torch for CUDA; None where only the definition serves the arguments."""
    backend = _backend(q, k, v, softmax, causal=causal, mask=mask)
    if backend == "math":
        return None
    took(backend)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if backend == "cudnn":
        return Partial(*cudnn_attention(q, k, v, causal=causal, scale=softmax.scale))
    if backend != "efficient":
        return Partial(*flash_attention_cuda(q, k, v, causal=causal, scale=softmax.scale))
    if mask is None:
        return Partial(*efficient_attention(q, k, v, bias=None, causal=causal, scale=softmax.scale))
    width = mask.shape[-1]
    bias = torch.full((*mask.shape[:-1], -(-width // 8) * 8), -torch.inf, dtype=q.dtype, device=q.device)
    bias[..., :width].masked_fill_(mask, 0)
    bias = bias[..., :width].expand(*q.shape[:3], -1)
    return _masked(*efficient_attention(q, k, v, bias=bias, causal=False, scale=softmax.scale), mask)


def _needs_grad(*tensors: Tensor) -> bool:
    # The library kernel's lse has no gradient; using it under autograd would silently lose part of dq and dk.
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None) -> Partial:
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = flash_attention_cpu(q, k, v, causal=causal, bias=bias, scale=scale)
    return Partial(out, lse) if mask is None else _masked(out, lse, mask)


def _masked(out: Tensor, lse: Tensor, mask: Tensor) -> Partial:
    """A kernel's result under ``mask``, with (0, -inf) in rows that read nothing: the CPU's kernel returns
    lse 0 there, and memory-efficient attention leaves it open."""
    none = ~mask.any(-1).expand(lse.shape)
    return Partial(out.masked_fill(none[..., None], 0), lse.masked_fill(none, -torch.inf))


def math(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, causal: bool, mask: Tensor | None) -> Partial:
    """The definition, tile by tile, in float32 (float64 for float64 inputs); differentiable, lse included."""
    tq, tk = q.shape[2], k.shape[2]
    rows = _ROWS
    if q.device.type != "cpu":
        rows = max(rows, _DEVICE // (q.shape[0] * q.shape[1] * min(tk, _COLS)))
    rows_out: list[Partial] = []
    for a in range(0, tq, rows):
        b = min(a + rows, tq)
        parts = []
        for c in range(0, b if causal else tk, _COLS):
            d = min(c + _COLS, tk)
            tile = None if mask is None else _cut(mask, a, b, c, d)
            if causal and d > a:
                below = torch.arange(c, d, device=q.device) <= torch.arange(a, b, device=q.device)[:, None]
                tile = below if tile is None else tile & below
            parts.append(_tile(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], softmax, tile))
        rows_out.append(merge(*parts))
    out = torch.cat([p.out for p in rows_out], 2)
    return Partial(out.to(q.dtype), torch.cat([p.lse for p in rows_out], 2))


def _cut(mask: Tensor, a: int, b: int, c: int, d: int) -> Tensor:
    return (mask if mask.shape[-2] == 1 else mask[..., a:b, :])[..., c:d]


def _tile(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, mask: Tensor | None) -> Partial:
    softcap = softmax.softcap
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = torch.matmul(q.to(wide), k.to(wide).transpose(-1, -2)) * softmax.scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    peak = logits.detach().amax(-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, torch.zeros_like(peak), peak)
    weights = torch.exp(logits - peak)
    total = weights.sum(-1, keepdim=True)
    safe = torch.where(total > 0, total, torch.ones_like(total))
    lse = torch.where(total > 0, peak + torch.log(safe), torch.full_like(total, -torch.inf))
    out = torch.matmul(weights / safe, v.to(wide))
    return Partial(out.masked_fill(total == 0, 0), lse[..., 0])  # 0 x NaN in an unread value would be NaN


def fold_groups(q: Tensor, num_kv_heads: int) -> Tensor:
    """[B, H, Tq, D] -> [B, Hkv, G * Tq, D]: the query heads of a group become rows, so that no key is
    expanded."""
    b, h, tq, d = q.shape
    return q.reshape(b, num_kv_heads, (h // num_kv_heads) * tq, d)


def unfold_groups(part: Partial, num_heads: int, tq: int) -> Partial:
    """Inverse of :func:`fold_groups` on a result."""
    b = part.out.shape[0]
    return Partial(part.out.reshape(b, num_heads, tq, -1), part.lse.reshape(b, num_heads, tq))
