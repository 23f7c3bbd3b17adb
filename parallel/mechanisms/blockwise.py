"""Attention of some spans of the sequence over others, by absolute position. Every mechanism computes this
once the keys have arrived.

Keys are in the order of their positions, so the keys that a query sees are always the first ones of a block:

    keys of this block     0 1 2 3 . . . . 8 9        query span [6, 12), cut where a key span begins or ends
    rows 6 7               x x x x                    a rectangle
    rows 8 9               x x x x         x .        a rectangle and a causal square
                           x x x x         x x
    rows 10 11             x x x x         x x        a rectangle
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention.kv import KV
from ...attention.ops import kernel
from ...attention.ops.flash import flash
from ...attention.partial import Partial, merge
from ...attention.softmax import Softmax
from .layout import Span

_ROWS, _COLS = 512, 4096  # tile of the backward: at most 8 MiB of float32 logits per head


class Piece(NamedTuple):
    """Rows of q that see the same ``keys``. causal: the last keys, as many as there are rows, form a causal
    square with them."""

    batch: slice
    rows: slice
    keys: slice
    causal: bool


def blockwise(
    q: Tensor,
    queries: Sequence[Span],
    k: Tensor,
    v: Tensor,
    keys: Sequence[Span],
    *,
    softmax: Softmax,
    starts: list[int] | None = None,
) -> Partial:
    """Causal attention of q [B, H, n, D] at the positions ``queries`` over k, v [B, Hkv, m, D] at ``keys``.

    queries, keys: ascending spans of n and m positions. starts: each row's first valid position (left
    padding); rows before it give (0, -inf), as do rows that see no key, and no key before it is read.
    Differentiable in q, k and v through out and lse, without keeping any logits. out is in float32 (float64).
    """
    return Partial(*_Blockwise.apply(q, k, v, tuple(queries), tuple(keys), softmax, starts))


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        queries, keys, softmax, starts = how
        total = nothing(q, v.shape[-1])
        add(total, q, queries, k, v, keys, softmax=softmax, starts=starts)
        ctx.save_for_backward(q, k, v, *total)
        ctx.how = how
        return total.out, total.lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        queries, keys, softmax, starts = ctx.how
        gradient = Gradient.of(Partial(out, lse), dout, dlse)
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        add_gradients(dq, dk, dv, gradient, q, queries, k, v, keys, softmax=softmax, starts=starts)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *(None for _ in ctx.how)


def nothing(q: Tensor, value_dim: int) -> Partial:
    """The partial over no keys, in the precision in which partials are merged."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(*q.shape[:-1], value_dim, dtype=wide, device=q.device)
    return Partial(out, torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device))


def add(
    total: Partial,
    q: Tensor,
    queries: Sequence[Span],
    k: Tensor,
    v: Tensor,
    keys: Sequence[Span],
    *,
    softmax: Softmax,
    starts: list[int] | None,
) -> None:
    """Merge the attention over one more set of keys into ``total``, in place; arguments as in
    :func:`blockwise`."""
    hkv = k.shape[1]
    for batch, rows, seen, causal in _pieces(q.shape[0], queries, keys, starts):
        x, kv = q[batch, :, rows], KV(k[batch, :, seen], v[batch, :, seen])
        if causal:
            part = flash(x, kv, softmax)
        else:
            folded = kernel.attend(kernel.fold_groups(x, hkv), kv, softmax)
            part = kernel.unfold_groups(folded, x.shape[1], x.shape[2])
        before = Partial(total.out[batch, :, rows], total.lse[batch, :, rows])
        total.out[batch, :, rows], total.lse[batch, :, rows] = merge(before, part)


def _pieces(
    batch: int, queries: Sequence[Span], keys: Sequence[Span], starts: list[int] | None
) -> Iterator[Piece]:
    if starts is None or len(set(starts)) == 1:
        yield from _row_pieces(slice(None), queries, keys, starts[0] if starts else 0)
        return
    for b in range(batch):
        yield from _row_pieces(slice(b, b + 1), queries, keys, starts[b])


def _row_pieces(batch: slice, queries: Sequence[Span], keys: Sequence[Span], first: int) -> list[Piece]:
    pieces: list[Piece] = []
    edges = {first, *(edge for span in keys for edge in span)}
    low, at = _below(keys, first), 0
    for c, d in queries:
        for x, y in pairwise(sorted({c, d, *(edge for edge in edges if c < edge < d)})):
            before, until = _below(keys, x), _below(keys, y)
            rows, seen, causal = slice(at, at + y - x), slice(low, until), until > before
            at = rows.stop
            if x < first or until == low:
                continue
            last = pieces[-1] if pieces else None
            if last and not causal and not last.causal and (last.rows.stop, last.keys) == (rows.start, seen):
                pieces[-1] = last._replace(rows=slice(last.rows.start, rows.stop))
            else:
                pieces.append(Piece(batch, rows, seen, causal))
    return pieces


def _below(spans: Sequence[Span], position: int) -> int:
    return sum(min(b, position) - a for a, b in spans if a < position)


class Gradient(NamedTuple):
    """What backward needs of the whole result, over all key sets.

    dout [B, H, n, D]. lse [B, H, n]: the merged one. delta [B, H, n]: rowsum(dout * out) minus the gradient
    of lse.
    """

    dout: Tensor
    lse: Tensor
    delta: Tensor

    @staticmethod
    def of(part: Partial, dout: Tensor, dlse: Tensor) -> Gradient:
        dout = dout.to(part.lse.dtype)
        return Gradient(dout, part.lse, (dout * part.out).sum(-1) - dlse)


def add_gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    gradient: Gradient,
    q: Tensor,
    queries: Sequence[Span],
    k: Tensor,
    v: Tensor,
    keys: Sequence[Span],
    *,
    softmax: Softmax,
    starts: list[int] | None,
) -> None:
    """Add the gradients that one set of keys contributes, in place, in the dtype of dq, dk, dv (float32,
    float64).

    The softmax is that over all key sets, recomputed from the merged lse: P = exp(S - lse),
    dS = P * (dO V^T - delta), as in FlashAttention (arXiv 2205.14135).
    """
    for batch, rows, seen, causal in _pieces(q.shape[0], queries, keys, starts):
        for a in range(rows.start, rows.stop, _ROWS):
            cut = slice(a, min(a + _ROWS, rows.stop))
            hidden = rows.stop - cut.stop if causal else 0  # keys later than every row of the tile
            there = slice(seen.start, seen.stop - hidden)
            _tile_gradients(
                dq[batch, :, cut],
                dk[batch, :, there],
                dv[batch, :, there],
                Gradient(*(x[batch, :, cut] for x in gradient)),
                q[batch, :, cut],
                k[batch, :, there],
                v[batch, :, there],
                causal,
                softmax,
            )


def _tile_gradients(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    gradient: Gradient,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax: Softmax,
) -> None:
    hkv, (_, h, n, _) = k.shape[1], q.shape
    wide, end = dq.dtype, k.shape[2]
    query, dout, lse, delta = (
        kernel.fold_groups(x if x.dim() == 4 else x[..., None], hkv).to(wide)
        for x in (q, gradient.dout, gradient.lse, gradient.delta)
    )
    for c in range(0, end, _COLS):
        d = min(c + _COLS, end)
        key, value = k[:, :, c:d].to(wide), v[:, :, c:d].to(wide)
        logits = query @ key.transpose(-1, -2) * softmax.scale
        slope = None
        if softmax.softcap is not None:
            bent = torch.tanh(logits / softmax.softcap)
            logits, slope = softmax.softcap * bent, 1 - bent * bent
        weights = torch.exp(logits - lse)
        if causal and d > end - n:
            above = torch.arange(c, d, device=q.device) > torch.arange(end - n, end, device=q.device)[:, None]
            weights = weights.masked_fill(above.repeat(h // hkv, 1), 0)
        dv[:, :, c:d] += weights.transpose(-1, -2) @ dout
        dlogits = weights * (dout @ value.transpose(-1, -2) - delta) * softmax.scale
        if slope is not None:
            dlogits *= slope
        dq += (dlogits @ key).reshape(q.shape)
        dk[:, :, c:d] += dlogits.transpose(-1, -2) @ query
