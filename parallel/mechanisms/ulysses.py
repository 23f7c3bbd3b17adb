"""Ulysses: an all-to-all turns some rows of all heads into all rows of some heads, and another one turns the
result back. Between them any attention for one device runs unchanged.

    P = 2       rank 0           rank 1                   rank 0            rank 1
    heads 0-3   rows 0 1 6 7     rows 2 3 4 5     ->      rows 0 .. 7       -
    heads 4-7   rows 0 1 6 7     rows 2 3 4 5             -                 rows 0 .. 7
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...attention.errors import FarspanError, Unsupported
from ...attention.partial import Partial
from ..group.autograd import exchange
from ..group.comm import Ranks
from .layout import Layout, Split
from .order import order

Run = Callable[[Tensor, Tensor, Tensor], Partial]
BACKENDS = ("torch", "deepspeed")
_NAME = "ulysses"


def unsupported(heads: int, kv_heads: int, size: int) -> list[str]:
    """The reasons why these heads cannot be divided among ``size`` ranks; empty where they can."""
    reasons = []
    if heads % size:
        reasons.append(f"{heads} query heads cannot be divided evenly among {size} ranks")
    if kv_heads % size and size % kv_heads:
        reasons.append(f"of {kv_heads} KV heads and {size} ranks neither is a multiple of the other")
    return reasons


def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: Split,
    ranks: Ranks,
    run: Run,
    *,
    past: Layout | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
    with_lse: bool = False,
    backend: str = "torch",
) -> tuple[Tensor, Tensor | None]:
    """``run`` on this rank's part of the heads, over the whole sequence.

    q [B, H, split.rows, D], k, v [B, Hkv, split.rows, D]: what this rank has computed. past_k, past_v
    [B, Hkv, n, D]: what it has stored, by ``past``. run(q [B, H / P, T, D], k, v
    [B, max(Hkv, P) / P, past + T, D]) -> Partial of those queries, all in the order of positions. ``run``
    applies scale, soft-cap and padding itself. Differentiable where ``run`` is.
    -> (out [B, H, split.rows, Dv] in the dtype of q, zero in split padding; with ``with_lse`` the lse
    [B, H, split.rows], -inf in split padding, else None).

    backend: "deepspeed" moves q, k, v and out by DeepSpeed's own sequence all-to-all.
    Raises Unsupported where the number of ranks does not divide the heads.
    Bytes sent: (P - 1) / P² * S * (2 H + 2 max(Hkv, P)) * D * e, where S counts the new tokens with split
    padding; the stored keys and values travel in addition. DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    every_rank = tuple(range(ranks.size))
    q, k, v = to_heads(q, k, v, split, ranks, every_rank, past, past_k, past_v, backend)
    queries, keys = order(split, None, every_rank, q.device), order(split, past, every_rank, k.device)
    part = run(queries.real(q), keys.real(k), keys.real(v))
    out = to_rows(queries.back(part.out.to(q.dtype)), ranks, backend)
    if not with_lse:
        return out, None
    return out, to_rows(queries.back(part.lse, -torch.inf)[..., None], ranks, backend)[..., 0]


def to_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: Split,
    ranks: Ranks,
    members: tuple[int, ...],
    past: Layout | None,
    past_k: Tensor | None,
    past_v: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, heads, rows of this rank, D] -> [B, heads / P, rows of all ranks, D], one rank after
    the other.

    ``members``: the ranks of ``ranks``, by their number in ``split`` and ``past``. Of k and v, each rank's
    stored rows come before its computed ones. Raises Unsupported where the ranks do not divide the heads.
    """
    size, hkv = ranks.size, k.shape[1]
    if reasons := unsupported(q.shape[1], hkv, size):
        raise Unsupported("Ulysses cannot serve this", reasons)
    if backend not in BACKENDS:
        raise Unsupported(f"Ulysses has no backend {backend!r}", [f"it has {' and '.join(BACKENDS)}"])
    new, stored, counts = [q, k, v], [], []
    if past is not None and past_k is not None and past_v is not None and past.length:
        stored, counts = [past_k, past_v], [past.count(member) for member in members]
    if hkv < size:
        k, v, *stored = (x.repeat_interleave(size // hkv, 1) for x in (k, v, *stored))
        new = [q, k, v]
    if backend == "deepspeed":
        moved = [list(_deepspeed_to_heads(x, ranks).split(split.rows, 2)) for x in new]
        moved += _to_heads(stored, [[n] * 2 for n in counts], ranks) if stored else []
    else:
        rows = [[split.rows] * 3 + [n] * 2 for n in counts] if stored else [[split.rows] * 3] * size
        moved = _to_heads(new + stored, rows, ranks)
    if stored:
        for i in (1, 2):  # what a rank has stored, then what it has computed
            moved[i] = [x for pair in zip(moved[i + 2], moved[i], strict=True) for x in pair]
    q, k, v = (torch.cat(parts, 2) for parts in moved[:3])
    return q, k, v


def to_rows(x: Tensor, ranks: Ranks, backend: str) -> Tensor:
    """[B, heads / P, rows of all ranks, D] -> [B, heads, rows of this rank, D], P times as many heads."""
    if backend == "deepspeed":
        return _deepspeed_to_rows(x, ranks)
    each = [1] * ranks.size
    parts = x.unflatten(2, (ranks.size, -1)).movedim(2, 0)  # [P, B, heads / P, rows, D]
    return exchange(parts, each, each, ranks, _NAME).transpose(0, 1).flatten(1, 2)


def _to_heads(tensors: list[Tensor], rows: list[list[int]], ranks: Ranks) -> list[list[Tensor]]:
    """Tensors [B, heads, n, D] -> for each, [B, heads / P, rows[source][i], D] from every source, in one
    collective."""
    size = ranks.size
    parts = [x.unflatten(1, (size, -1)).movedim(1, 0) for x in tensors]  # [P, B, heads / P, n, D]
    message = torch.cat([x.reshape(size, -1) for x in parts], 1)
    shapes = [[(*x.shape[1:3], n, x.shape[4]) for x, n in zip(parts, counts, strict=True)] for counts in rows]
    sizes = [[torch.Size(shape).numel() for shape in source] for source in shapes]
    receive = [sum(source) for source in sizes]
    came = exchange(message.view(-1), [message.shape[1]] * size, receive, ranks, _NAME)
    sources = [
        [x.view(shape) for x, shape in zip(part.split(cuts), source, strict=True)]
        for part, cuts, source in zip(came.split(receive), sizes, shapes, strict=True)
    ]
    return [list(parts) for parts in zip(*sources, strict=True)]


def _deepspeed_to_heads(x: Tensor, ranks: Ranks) -> Tensor:
    return _DeepSpeed.apply(x.transpose(1, 2), 2, 1, ranks, _NAME).transpose(1, 2)


def _deepspeed_to_rows(x: Tensor, ranks: Ranks) -> Tensor:
    return _DeepSpeed.apply(x.transpose(1, 2), 1, 2, ranks, _NAME).transpose(1, 2)


class _DeepSpeed(torch.autograd.Function):
    """DeepSpeed's exchange of x [B, rows, heads, D]: dimension ``scatter`` is divided among the
    ranks, ``collect`` is gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: int, collect: int, ranks: Ranks, name: str) -> Tensor:
        ctx.how = (collect, scatter, ranks, f"{name}_backward")
        sent = x.numel() // ranks.size * (ranks.size - 1) * x.element_size()
        layer = _deepspeed()
        with ranks.counted(name, sent):
            return layer.single_all_to_all(x, scatter, collect, 0, ranks.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _DeepSpeed.apply(grad, *ctx.how), None, None, None, None


def _deepspeed() -> ModuleType:
    """deepspeed.sequence.layer, set up to use torch's process groups as they are."""
    try:
        comm = importlib.import_module("deepspeed.comm")
        layer = importlib.import_module("deepspeed.sequence.layer")
    except ImportError as error:
        raise FarspanError(
            "backend='deepspeed' needs the package deepspeed, which cannot be imported here "
            f"({error}): pip install 'farspan[parallel]'."
        ) from error
    if not comm.is_initialized():
        # On the CPU DeepSpeed would first compile a shared-memory all-reduce, which takes half a minute.
        known = importlib.import_module("deepspeed.ops").__compatible_ops__
        before, known["deepspeed_shm_comm"] = known.get("deepspeed_shm_comm", False), False
        try:
            comm.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        finally:
            known["deepspeed_shm_comm"] = before
    return layer
