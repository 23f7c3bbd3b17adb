"""Blocks of keys that chosen columns and diagonals of an attention map pass through."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import marked
from ..budget import select_topk
from ..ops.select import by_mass, by_threshold
from ..selection import BlockIndex


def highest(x: Tensor, size: Tensor, max_size: int, always: int) -> Tensor:
    """[1, Hs, T] bool: the ``size`` [1 or Hs] highest of x [1, Hs, T], of which the first ``always`` count as
    the highest. max_size: of all sizes, on the host."""
    n = x.shape[-1]
    ranked = x.masked_fill(torch.arange(n, device=x.device) < always, torch.inf)
    chosen, counts = select_topk(ranked, size.clamp(max=n).expand(x.shape[:2]), min(max_size, n))
    assert counts is not None
    return marked(chosen, counts, n)


def holding_mass(x: Tensor, mass: float, always: int) -> Tensor:
    """[1, Hs, T] bool: the fewest of x [1, Hs, T] that hold ``mass`` of its sum, and the first ``always``."""
    chosen = marked(*by_mass(x, mass), x.shape[-1])
    chosen[..., :always] = True
    return chosen


def slash_blocks(columns: Tensor, nearer: Tensor, past: int, block: int) -> BlockIndex | None:
    """The blocks that the queries past .. Tk - 1 of an unpadded row read; None where that is everything.

    columns [1, Hs, Tk] bool: the keys that are columns. nearer [1, Hs, T + 1]: how many chosen diagonals are
    nearer than each distance. Keys that are no column come first, in order, and the columns after them.
    """
    length, device = columns.shape[2], columns.device
    order = columns.to(torch.int8).argsort(dim=-1, stable=True)  # [1, Hs, length], the columns last
    begin = torch.arange(past, length, block, device=device)[:, None]  # [Nq, 1]
    end = (begin + block).clamp(max=length)
    rows, everything = [], True
    heads = zip(columns.flatten(0, 1), order.flatten(0, 1), nearer.flatten(0, 1), strict=True)
    for head in heads:  # its [Nq, Nk] at a time
        read, there = _blocks_of_head(*head, begin, end, block)
        everything = everything and bool((read | ~there).all())
        rows.append(by_threshold(read.float(), 0.5))
    if everything:
        return None
    room = max(blocks.shape[1] for blocks, _ in rows)
    blocks = torch.stack([pad(blocks.int(), (0, room - blocks.shape[1])) for blocks, _ in rows])
    return BlockIndex(
        blocks=blocks.unflatten(0, order.shape[:2]),
        counts=torch.stack([counts for _, counts in rows]).unflatten(0, order.shape[:2]),
        block_q=block,
        block_k=block,
        key_order=order.int(),
    )


def _blocks_of_head(
    columns: Tensor, order: Tensor, nearer: Tensor, begin: Tensor, end: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """[Nq, Nk] bool, of one head: which blocks of keys in ``order`` are read, and which hold a visible
    key."""
    length = len(order)
    places = pad(order, (0, -length % block), value=length).view(-1, block)
    first, last = places[:, 0], places[:, -1].clamp(max=length)
    there = places.amin(1) < end
    others = (~columns).cumsum(0)
    passing = nearer[(end - first).clamp(min=0)] > nearer[(begin - last).clamp(min=0)]
    cols = torch.arange(len(places), device=order.device)
    latest = cols == (others[end - 1] - 1) // block  # holds the latest key that is no column
    return torch.where(cols < others[-1] // block, passing | latest, there), there
