"""Ring attention: the K and V of each rank travel round a ring, past the queries of every other rank.

P = 3      step 0    step 1    step 2          the next block is on its way while this one is computed;
rank 0      kv 0      kv 2      kv 1           a rank never holds more than two blocks
rank 1      kv 1      kv 0      kv 2
rank 2      kv 2      kv 1      kv 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.partial import Partial
from ...attention.softmax import Softmax
from ..group.comm import Ranks
from .blockwise import Gradient, add, add_gradients, nothing
from .layout import Layout, Span, Split
from .order import held_spans, order


def ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    split: Split,
    ranks: Ranks,
    *,
    softmax: Softmax,
    starts: list[int] | None = None,
    past: Layout | None = None,
    past_k: Tensor | None = None,
    past_v: Tensor | None = None,
) -> Partial:
    """Causal attention of this rank's new tokens over the keys of all ranks, in memory O(S / P).

    q [B, H, split.rows, D], k, v [B, Hkv, split.rows, D]: what this rank has computed. past_k, past_v
    [B, Hkv, n, D]: what it has stored, by ``past``. starts: each row's first valid position. Differentiable
    in all five tensors. -> Partial in float32 (float64), (0, -inf) in padding and split padding.

    Bytes sent: all blocks except that of the next rank, (P - 1) / P * S * 2 Hkv D e for equal blocks.
    Backward sends them again, and their gradients in float32.
    Ring Attention, arXiv 2310.01889, with the zigzag split of arXiv 2411.01783.
    """
    me = (ranks.rank,)
    if past is not None and past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    mine = order(split, None, me, q.device)
    keys = order(split, past, me, k.device)
    blocks = [
        Block(held_spans(split, past, (r,)), split.rows + (past.count(r) if past else 0))
        for r in range(ranks.size)
    ]
    part = circulate(
        mine.real(q),
        held_spans(split, None, me),
        keys.sorted(k),
        keys.sorted(v),
        blocks,
        ranks,
        softmax=softmax,
        starts=starts,
    )
    return Partial(mine.back(part.out), mine.back(part.lse, -torch.inf))


@dataclass(frozen=True)
class Block:
    """The keys and values of one rank as they travel. spans: their positions. rows: how many travel, split
    padding last."""

    spans: tuple[Span, ...]
    rows: int

    @property
    def count(self) -> int:
        """Rows without split padding."""
        return sum(b - a for a, b in self.spans)


def circulate(
    q: Tensor,
    queries: tuple[Span, ...],
    k: Tensor,
    v: Tensor,
    blocks: list[Block],
    ranks: Ranks,
    *,
    softmax: Softmax,
    starts: list[int] | None,
) -> Partial:
    """Attention of q [B, H, n, D] at ``queries`` over the blocks of all ranks; k, v [B, Hkv, rows, D] are
    this rank's."""
    return Partial(*_Ring.apply(q, k, v, queries, blocks, ranks, softmax, starts))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: tuple[Span, ...],
        blocks: list[Block],
        ranks: Ranks,
        softmax: Softmax,
        starts: list[int] | None,
    ) -> tuple[Tensor, Tensor]:
        total = nothing(q, v.shape[-1])
        message = _message(k, v)
        for step in range(ranks.size):
            block, after = _block(blocks, ranks, step), _block(blocks, ranks, step + 1)
            arrived = None
            if step < ranks.size - 1:
                arrived = _pass_on(message, _size(k, v, after), ranks, "ring")
            key, value = (x[:, :, : block.count] for x in _views(message, k, v, block))
            add(total, q, queries, key, value, block.spans, softmax=softmax, starts=starts)
            if arrived:
                message = arrived()
        ctx.save_for_backward(q, k, v, *total)
        ctx.queries, ctx.blocks, ctx.ranks = queries, blocks, ranks
        ctx.softmax, ctx.starts = softmax, starts
        return total.out, total.lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        """K and V go round once more. The gradients of a block start at the rank after its owner. They follow
        the block one step later, and end at the owner, which adds its own part."""
        q, k, v, out, lse = ctx.saved_tensors
        ranks, name = ctx.ranks, "ring_backward"
        gradient = Gradient.of(Partial(out, lse), dout, dlse)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        message = _message(k, v)
        returning: Callable[[], Tensor] | None = None
        for step in range(ranks.size):
            block, after = _block(ctx.blocks, ranks, step), _block(ctx.blocks, ranks, step + 1)
            arrived = None
            if step < ranks.size - 1:
                arrived = _pass_on(message, _size(k, v, after), ranks, name)
            part = lse.new_zeros(_size(k, v, block))
            key, value, dk, dv = (
                x[:, :, : block.count] for m in (message, part) for x in _views(m, k, v, block)
            )
            add_gradients(
                dq, dk, dv, gradient, q, ctx.queries, key, value, block.spans,
                softmax=ctx.softmax, starts=ctx.starts,
            )  # fmt: skip
            if step == 0:
                own = part
            else:
                if returning:
                    part += returning()
                returning = _pass_on(part, _size(k, v, after), ranks, name)
            if arrived:
                message = arrived()
        if returning:
            own += returning()
        dk, dv = _views(own, k, v, _block(ctx.blocks, ranks, 0))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *[None] * 5


def _pass_on(message: Tensor, size: int, ranks: Ranks, name: str) -> Callable[[], Tensor]:
    """Start to send to the next rank. -> a function that waits for the ``size`` elements from the previous
    rank and returns them."""
    received = message.new_empty(size)
    shift = ranks.shift(message, received, name=name)

    def arrived() -> Tensor:
        shift.wait()
        return received

    return arrived


def _block(blocks: list[Block], ranks: Ranks, step: int) -> Block:
    return blocks[(ranks.rank - step) % ranks.size]


def _message(k: Tensor, v: Tensor) -> Tensor:
    """K and V in one tensor, so that a step is one message."""
    return torch.cat([k.reshape(-1), v.reshape(-1)])


def _size(k: Tensor, v: Tensor, block: Block) -> int:
    return k.shape[0] * k.shape[1] * block.rows * (k.shape[3] + v.shape[3])


def _views(message: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """K and V [B, Hkv, rows, D] of ``block`` in its message."""
    b, hkv, _, d = k.shape
    cut = b * hkv * block.rows * d
    return (
        message[:cut].view(b, hkv, block.rows, d),
        message[cut:].view(b, hkv, block.rows, v.shape[3]),
    )
