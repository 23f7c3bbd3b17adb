"""The summaries of some rows of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .sources import Supply
from .summary import Summaries, Summary, count_entries


class SomeRows(Summaries):
    """The entries of ``rows`` of a batch, out of those of the whole batch, which has ``supply`` and whose
    rows begin at ``starts``. The rows' own positions are first .. end - 1."""

    def __init__(
        self,
        whole: Summaries,
        supply: Supply,
        starts: list[int] | None,
        rows: slice,
        first: int = 0,
        end: int | None = None,
    ) -> None:
        super().__init__()
        self._whole, self._supply, self._starts = whole, supply, starts
        self._rows, self._first, self._end = rows, first, end

    def get(self, summary: Summary, supply: Supply, starts: list[int] | None) -> Tensor:
        entries = self._whole.get(summary, self._supply, self._starts)[self._rows]
        if summary.block is None:
            return entries[:, :, self._first : self._end]
        count = count_entries(summary, supply.length)
        if self._end is None or self._end >= self._supply.length or supply.length >= count * summary.block:
            return entries[:, :, :count]
        # the last block has padding behind the row in it
        begin = self._first + (count - 1) * summary.block
        last = self._supply.sources(summary.reads, begin).cut(0, self._end - begin, self._rows)
        return torch.cat([entries[:, :, : count - 1], summary.compute(last)], 2)

    def entries(self, summary: Summary, length: int) -> Tensor:
        return self._whole.entries(summary, length)[self._rows]

    def done(self, summary: Summary) -> int:
        return self._whole.done(summary)
