"""Brings the rows of a call into the order of their positions, with split padding last, and back."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout, Span, Split

_LAST = torch.iinfo(torch.long).max  # the sort key of split padding


@dataclass(frozen=True)
class Order:
    """The permutation between the rows of some ranks, one rank after the other, and the same rows sorted by
    position with split padding last.

    count: rows without split padding. rows: all rows. The indices are None where the two orders are equal.
    """

    count: int
    rows: int
    _sort: Tensor | None
    _back: Tensor | None

    def sorted(self, x: Tensor) -> Tensor:
        """x [B, H, rows, ...] sorted by position; the last rows - count of them are split padding."""
        return x if self._sort is None else x.index_select(2, self._sort)

    def real(self, x: Tensor) -> Tensor:
        """x [B, H, rows, ...] -> [B, H, count, ...], sorted by position, without split padding."""
        return self.sorted(x).narrow(2, 0, self.count)

    def back(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """The inverse of :meth:`real`; rows of split padding become ``fill``.

        The result depends on x for autograd even where every row is split padding. Otherwise this rank would
        leave the graph, and the others would wait for it in backward.
        """
        shape = (*x.shape[:2], self.rows - self.count, *x.shape[3:])
        x = torch.cat([x, x.new_full(shape, fill)], 2)
        return x if self._back is None else x.index_select(2, self._back)


@functools.lru_cache(maxsize=8)  # every layer of a call has the same arguments
@torch.inference_mode(False)  # otherwise a backward could not keep the indices
def order(split: Split, past: Layout | None, members: tuple[int, ...], device: torch.device) -> Order:
    """The order of the rows of ``members``: of each rank its stored rows (``past``; None leaves them out),
    then its computed rows of ``split``."""
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


def held_spans(split: Split, past: Layout | None, members: tuple[int, ...]) -> tuple[Span, ...]:
    """The positions of the same rows as ascending spans; neighbouring spans are joined."""
    layout = split.layout() if past is None else past.extended(split.layout())
    joined: list[Span] = []
    for a, b in sorted(span for rank in members for span in layout.spans[rank]):
        if joined and joined[-1][1] == a:
            a = joined.pop()[0]
        joined.append((a, b))
    return tuple(joined)
