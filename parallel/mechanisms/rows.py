"""The rows of a call, filling and all, brought into the order of their positions, and back."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout, Span, Split

_LAST = torch.iinfo(torch.long).max  # what filling is sorted by


@dataclass(frozen=True)
class Order:
    """Rows of some ranks, one rank's behind the other's, against the same rows by position, filling last.

    count: rows that are no filling. rows: all of them. Indices are None where nothing changes place.
    """

    count: int
    rows: int
    _sort: Tensor | None
    _back: Tensor | None

    def sorted(self, x: Tensor) -> Tensor:
        """x [B, H, rows, ...] by position; the last rows - count of them are filling."""
        return x if self._sort is None else x.index_select(2, self._sort)

    def real(self, x: Tensor) -> Tensor:
        """x [B, H, rows, ...] -> [B, H, count, ...], by position, without filling."""
        return self.sorted(x).narrow(2, 0, self.count)

    def back(self, x: Tensor, filling: float = 0.0) -> Tensor:
        """The inverse of :meth:`real`; rows of filling get ``filling``.

        The result hangs on x for autograd even where every row is filling: a rank that left the graph would
        leave the others waiting in backward.
        """
        shape = (*x.shape[:2], self.rows - self.count, *x.shape[3:])
        x = torch.cat([x, x.new_full(shape, filling)], 2)
        return x if self._back is None else x.index_select(2, self._back)


@functools.lru_cache(maxsize=8)  # asked for by every layer of a call
@torch.inference_mode(False)  # or a backward could not keep the indices
def order(split: Split, past: Layout | None, members: tuple[int, ...], device: torch.device) -> Order:
    """The order of what ``members`` hold: each one's stored rows (``past``; None: leave them out) and behind
    them its computed rows of ``split``."""
    positions = []
    for rank in members:
        if past is not None:
            positions.append(past.positions(rank))
        computed = torch.full((split.rows,), _LAST)
        for slot, (a, b) in split.slots(rank):
            computed[slot] = torch.arange(a, b)
        positions.append(computed)
    where = torch.cat(positions)
    sort = torch.argsort(where, stable=True)
    count, rows = int((where < _LAST).sum()), len(where)
    if torch.equal(sort, torch.arange(rows)):
        return Order(count, rows, None, None)
    return Order(count, rows, sort.to(device), torch.argsort(sort).to(device))


def held(split: Split, past: Layout | None, members: tuple[int, ...]) -> tuple[Span, ...]:
    """Positions of the same rows, ascending, neighbours joined."""
    layout = split.layout() if past is None else past.extended(split.layout())
    joined: list[Span] = []
    for a, b in sorted(span for rank in members for span in layout.spans[rank]):
        if joined and joined[-1][1] == a:
            a = joined.pop()[0]
        joined.append((a, b))
    return tuple(joined)
