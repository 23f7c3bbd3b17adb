"""Which implementation of each operation this machine can run, asked with small calls of all operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..attention.errors import FarspanError
from ..attention.kv import KV
from ..attention.ops.append import append
from ..attention.ops.block_max import block_max
from ..attention.ops.block_sparse import block_sparse
from ..attention.ops.decode import decode
from ..attention.ops.dispatch import OWN, Explained, explanations
from ..attention.ops.estimate_topk import estimate_topk
from ..attention.ops.flash import flash
from ..attention.ops.gather_decode import gather_decode
from ..attention.ops.int4_scores import int4_block_max, int4_scores, quantise_int4
from ..attention.ops.pool import pool, pool_segments
from ..attention.ops.scan import scan
from ..attention.ops.scores import scores
from ..attention.ops.select import top_k
from ..attention.selection import BlockIndex, TokenIndex
from ..attention.softmax import Softmax

_KEYS, _BLOCK = 256, 128


def best_dtype() -> torch.dtype:
    """bfloat16, or float16 on a GPU that has no bfloat16."""
    older = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
    return torch.float16 if older else torch.bfloat16


def operations(dtype: torch.dtype, head_dim: int, device: torch.device) -> list[dict[str, Any]]:
    """For each operation, ``auto``: the implementation that "auto" takes where ``tune`` has measured nothing,
    and ``against``: by implementation, the reasons against it (none: it can run).

    Raises FarspanError for an odd head_dim, which four-bit keys do not have."""
    if head_dim < 2 or head_dim % 2:
        raise FarspanError(f"Heads have an even size, at least 2; got {head_dim}.")
    calls = _calls(dtype, head_dim, device)
    with torch.no_grad(), explanations() as explained:
        for call in calls:
            call()
    first: dict[str, Explained] = {}
    for one in explained:
        first.setdefault(one.op, one)
    return [{"op": one.op, "auto": one.auto, "against": one.reasons} for one in first.values()]


def _calls(dtype: torch.dtype, d: int, device: torch.device) -> list[Callable[[], Any]]:
    """A small call of each operation, run by eager torch: another implementation would be compiled for it."""

    def tensor(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(1, *shape, dtype=kind, device=device)

    q, k, one = tensor(8, _KEYS, d), tensor(2, _KEYS, d), tensor(8, 1, d)
    kv, lse, plain = KV(k, k), tensor(8, _KEYS, kind=torch.float32), Softmax(1.0)
    blocks = tensor(2, _KEYS // _BLOCK, 1, kind=torch.int32)
    index = BlockIndex(blocks=blocks, counts=blocks[..., 0] + 1, block_q=_BLOCK, block_k=_BLOCK)
    tokens = TokenIndex(tokens=tensor(2, 1, 1, kind=torch.int64))
    bounds, channels = tensor(2, kind=torch.int64), torch.arange(d, device=device).expand(2, d)
    new, length = tensor(2, 1, d), tensor(kind=torch.int32) + 1  # of a store of fixed size
    k4 = quantise_int4(k, 64, impl="eager")
    return [
        lambda: flash(q, kv, plain, impl="eager"),
        lambda: block_sparse(q, kv, index, plain, impl="eager"),
        lambda: decode(one, kv, plain, impl="eager"),
        lambda: gather_decode(one, kv, tokens, plain, impl="eager"),
        lambda: append(new, new, kv, length, impl="eager"),
        lambda: estimate_topk(one, k, plain, length, 1, channels=channels, impl="eager"),
        lambda: scores(one, k, impl="eager"),
        lambda: top_k(lse[0], 4, impl="eager"),
        lambda: pool(k, 16, mode="mean", impl="eager"),
        lambda: pool_segments(k, bounds, mode="mean", impl="eager"),
        lambda: block_max(q, k, lse, plain, block_q=_BLOCK, block_k=_BLOCK, impl="eager"),
        lambda: quantise_int4(k, 64, impl="eager"),
        lambda: int4_scores(one, k4, impl="eager"),
        lambda: int4_block_max(q, k4, lse, plain, block_q=64, impl="eager"),
        lambda: scan(k, k, q, lse, impl="eager"),
    ]


def why_not(found: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(implementation, operations, reasons) of what cannot run, operations with the same reasons together; of
    a library that can run, that "auto" takes it after a measurement only."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for one in found:
        for name, reasons in one["against"].items():
            text = "; ".join(reasons)
            if not reasons and name not in OWN:
                text = 'can run; "auto" takes it where "farspan tune" measured it faster'
            if text:
                grouped.setdefault((name, text), []).append(one["op"])
    return [(name, ", ".join(ops), text) for (name, text), ops in grouped.items()]
