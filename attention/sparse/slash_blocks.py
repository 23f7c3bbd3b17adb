"""Blocks of keys that chosen columns and diagonals of an attention map pass through."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import holding, marked
from ..budget import select_topk
from ..ops.select import by_threshold
from ..selection import BlockIndex

_CPU, _DEVICE = 1 << 22, 1 << 24  # pairs of blocks of queries and of keys that are looked at at a time


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
    chosen = holding(x, mass, x.shape[-1])
    chosen[..., :always] = True
    return chosen


def slash_blocks(columns: Tensor, nearer: Tensor, past: int, block: int) -> BlockIndex | None:
    """The blocks that the queries past .. Tk - 1 of an unpadded row read; None where that is everything.

    columns [B, Hs, Tk] bool: the keys that are columns. nearer [B, Hs, T + 1]: how many chosen diagonals are
    nearer than each distance. Keys that are no column come first, in order, and the columns after them.
    The call waits for the device once: to learn whether everything is read, and how long the lists are. Lists
    as wide as all blocks of keys would be larger than the keys.
    """
    length, device = columns.shape[2], columns.device
    order = columns.to(torch.int8).argsort(dim=-1, stable=True)  # [B, Hs, length], the columns last
    begin = torch.arange(past, length, block, device=device)[:, None]  # [Nq, 1]
    end = (begin + block).clamp(max=length)
    step = max(1, (_CPU if device.type == "cpu" else _DEVICE) // (len(begin) * -(-length // block)))
    heads = [x.flatten(0, 1).split(step) for x in (columns, order, nearer)]
    read, found = [], []
    for its_columns, its_order, its_nearer in zip(*heads, strict=True):  # their [heads, Nq, Nk] at a time
        mask, there = _blocks_of_heads(its_columns, its_order, its_nearer, begin, end, block)
        read.append(mask)
        found.append(torch.stack([(~(mask | ~there)).sum(), mask.sum(-1).max()]))
    left_out, room = torch.stack(found).amax(0).tolist()
    if not left_out:
        return None
    room = max(1, room)
    most = None if device.type == "cpu" else room  # counting the lists once more costs nothing on the CPU
    lists = [by_threshold(mask.float(), 0.5, most=most) for mask in read]
    blocks = torch.cat([pad(blocks.int(), (0, room - blocks.shape[2])) for blocks, _ in lists])
    return BlockIndex(
        blocks=blocks.unflatten(0, order.shape[:2]),
        counts=torch.cat([counts for _, counts in lists]).unflatten(0, order.shape[:2]),
        block_q=block,
        block_k=block,
        key_order=order.int(),
    )


def _blocks_of_heads(
    columns: Tensor, order: Tensor, nearer: Tensor, begin: Tensor, end: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """[heads, Nq, Nk] bool, of some heads: which blocks of keys in ``order`` are read, and which hold a
    visible key."""
    length = order.shape[1]
    places = pad(order, (0, -length % block), value=length).unflatten(1, (-1, block))  # [heads, Nk, block]
    first, last = places[:, None, :, 0], places[:, None, :, -1].clamp(max=length)
    there = places.amin(2)[:, None] < end
    others = (~columns).cumsum(1)

    def diagonals(distance: Tensor) -> Tensor:
        """How many chosen diagonals are nearer, [heads, Nq, Nk]."""
        return nearer.gather(1, distance.clamp(min=0).flatten(1)).view_as(distance)

    passing = diagonals(end - first) > diagonals(begin - last)
    cols = torch.arange(places.shape[1], device=order.device)
    # The block that holds the latest key that is no column.
    latest = cols == ((others[:, end[:, 0] - 1] - 1) // block)[..., None]
    return torch.where(cols < (others[:, -1:] // block)[..., None], passing | latest, there), there
