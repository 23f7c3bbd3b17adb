"""``block_sparse`` by torch's FlexAttention: an alternative that the library makes, an oracle and a rival.

It is compiled once for each shape, which takes seconds. On the CPU it needs a C++ compiler, and FlexAttention
gives no log-sum-exp there: the lse of the result is NaN, so that a merge of it shows at once.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import Unsupported
from ...kv import KV
from ...lists import BlockLists
from ...partial import Partial
from ...softmax import Softmax
from ..torch_private import compile_errors, refuse_uncompiled


def unsupported(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> list[str]:
    """Why FlexAttention cannot run these arguments, one clause each."""
    reasons = index.not_in_a_block_mask()
    if kv.streams:
        reasons.append(f"FlexAttention reads plain keys and values, and these are stored as {kv.format}")
    if q.dtype == torch.float64:
        reasons.append("FlexAttention has no float64")
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, kv)):
            reasons.append("FlexAttention has no backward on the CPU")
        if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            reasons.append("on the CPU it is compiled, and there is no C++ compiler")
    elif any(size < 16 or size & (size - 1) for size in (index.block_q, index.block_k)):
        reasons.append(
            f"on CUDA its blocks are powers of two from 16 on; these are {index.block_q} and {index.block_k}"
        )
    elif q.shape[-1] < 16:
        reasons.append(f"FlexAttention takes heads of at least 16; these have {q.shape[-1]}")
    return reasons


def better_eager(q: Tensor, *args: Any) -> bool:
    """Whether "auto" leaves these arguments to torch: a result without an lse cannot be merged."""
    return q.device.type == "cpu"


def block_sparse(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> Partial:
    options: dict[str, Any] = {}
    if index.block_q < 128:  # its default tile for Hopper has 128 queries, and must divide the block
        options = {"BLOCK_M": index.block_q, "BLOCK_N": min(64, index.block_k), "num_warps": 4}
    return attend(q, kv, index, softmax, options)


def attend(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax, options: dict[str, Any]) -> Partial:
    """FlexAttention over the blocks of ``index``. options: its ``kernel_options`` on CUDA.

    Raises Unsupported where it cannot be compiled for these arguments, or has been compiled too often.
    """
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, kv))
    how: dict[str, Any] = {
        "score_mod": _bend(softmax.softcap),
        "block_mask": index.to_block_mask(q.shape[2], kv.length, q.shape[1], transposed=needs_grad),
        "scale": softmax.scale,
        "enable_gqa": q.shape[1] != kv.num_kv_heads,
    }
    flex = compiled()
    k, v = kv.dense()
    try:
        if q.device.type == "cpu":
            out = flex(q, k.contiguous(), v.contiguous(), **how)
            return Partial(out, torch.full(q.shape[:3], torch.nan))
        from torch.nn.attention.flex_attention import AuxRequest

        out, aux = flex(q, k, v, return_aux=AuxRequest(lse=True), kernel_options=options or None, **how)
        return Partial(out, aux.lse)
    except compile_errors() as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unsupported("FlexAttention cannot be compiled for this", [first.rstrip(".")]) from error


@functools.cache
def compiled() -> Callable[..., Any]:
    """FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    refuse_uncompiled()
    return torch.compile(flex_attention)


@functools.cache
def _bend(softcap: float | None) -> Callable[..., Tensor] | None:
    """FlexAttention's score_mod for a soft-cap."""
    if softcap is None:
        return None

    def bend(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return bend
