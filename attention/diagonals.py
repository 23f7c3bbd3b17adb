"""The attention of a prompt's last queries, summed per key (columns) and per distance (diagonals)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .blocks import Grid
from .keys import Keys
from .ops.select import top_k
from .ops.sums import running_sum
from .received import attention_of_last


def columns_and_diagonals(q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """The attention of queries q [B, H, n, D], the call's last, summed by key and summed by the distance of
    query and key: [B, Hkv, G, Tk] each. Rows are not padded, and all keys are here."""
    length = keys.length
    columns = torch.zeros((), device=q.device)
    diagonals = torch.zeros((), device=q.device)
    for first, tile in attention_of_last(q, keys, length):
        rest = length - tile.shape[-1]
        columns = columns + pad(tile.sum(3), (0, rest))
        diagonals = diagonals + pad(_along_diagonals(tile, tile.shape[-1] - 1 - first), (0, rest))
    return columns, diagonals


def keep_highest(x: Tensor, size: int) -> Tensor:
    """x [B, Hs, T] with all but its ``size`` highest entries, at least one, set to 0."""
    chosen = top_k(x, max(1, size))
    return torch.zeros_like(x).scatter(2, chosen, x.gather(2, chosen))


def block_sums(columns: Tensor, diagonals: Tensor, grid: Grid) -> Tensor:
    """[..., Nq, Nk]: for each block of queries and of keys the sum of the ``columns`` [..., Tk] in the block
    of keys and of the ``diagonals`` [..., T], by distance, that pass from some query of the one to some key
    of the other."""
    columns = pad(columns, (0, -columns.shape[-1] % grid.block_k)).unflatten(-1, (-1, grid.block_k)).sum(-1)
    nearer = pad(running_sum(diagonals.double()), (1, 0))  # small shares are differences of large sums
    first = grid.cols * grid.block_k
    upto = (grid.end[:, None] - first).clamp(min=0)  # after the furthest of their distances
    since = (grid.begin[:, None] - first - (grid.block_k - 1)).clamp(min=0)
    passing = nearer[..., upto] - nearer[..., since]
    return passing.to(columns.dtype) + columns[..., None, :]


def _along_diagonals(tile: Tensor, back: int) -> Tensor:
    """Sums of probabilities [..., rows, M] by distance of query and key, [..., M]; the first row's query is
    ``back`` positions before the last key.

    With ``back`` zeros on the left, the entries at one distance stand one row down and one place right of
    each other, from the last column's 0 to the first's M - 1.
    """
    rows, n = tile.shape[-2:]
    wide = pad(tile, (back, 0))
    width = n + back
    shape = (*tile.shape[:-2], rows, n)
    skewed = wide.as_strided(shape, (*wide.stride()[:-2], width + 1, 1))
    return skewed.sum(-2).flip(-1)
