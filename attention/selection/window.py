"""Recent keys and the first keys of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..causal import causal_mask, positions
from ..keys import Keys
from ..ops.decode import decode
from ..ops.flash import flash
from ..ops.sinks import with_sinks
from ..partial import Partial, merge
from .base import Pairs, Selection
from .here import attend_masked, attend_recent, query_positions


@dataclass(frozen=True, kw_only=True)
class Window(Selection):
    """The last ``size`` keys of each query, itself included, and the first ``sinks`` keys of its row."""

    called: ClassVar[str] = "a Window"

    size: int
    sinks: int = 0

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        where, start = (keys.kv, keys.softmax), keys.start
        part = flash(q, *where, window=self.size, start=start, impl=impl)
        part = with_sinks(
            part, q, *where, window=self.size, sinks=self.sinks, start=start, starts=keys.starts
        )
        return part, self._pairs(q, keys, rows)

    def run_decode(self, q: Tensor, keys: Keys, impl: str) -> tuple[Partial, Pairs]:
        where = keys.kv, keys.softmax
        part = decode(q, *where, window=self.size, sinks=self.sinks, start=keys.start, impl=impl)
        return part, self._pairs(q, keys, range(keys.tq))

    def run_decode_here(self, q: Tensor, keys: Keys) -> tuple[Partial, Pairs]:
        local, pairs = attend_recent(q, keys, self.size), self._pairs_here(q, keys)
        if self.sinks == 0 or keys.longest() <= self.size:
            return local, pairs
        starts = keys.starts or [0]
        low, high = keys.held(min(starts)), keys.held(max(starts) + self.sinks)
        places = keys.places()[low:high]
        beyond = places <= query_positions(keys)[:, None] - self.size  # the window, on its left
        first = 0 if keys.start is None else keys.start[:, None, None]
        sinks = (places >= first) & (places < first + self.sinks)
        return merge(local, attend_masked(q, keys, low, high, beyond & sinks)), pairs

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        begin, end = chunk
        places = torch.arange(end, device=device)
        first = torch.tensor(starts, device=device)[:, None]
        read = (places >= first) & ((places > begin - self.size) | (places < first + self.sinks))
        return read[:, None].expand(-1, kv_heads, -1)

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        mask = causal_mask(tq, tk, start, batch, None if rows is None else rows.device, rows)
        places, cols = positions(tq, tk, mask.device, rows)
        recent = (cols > places - self.size)[None, None]
        return mask & (recent | first_keys(self.sinks, cols, start, batch))

    def _pairs(self, q: Tensor, keys: Keys, rows: range) -> int:
        """The pairs that the queries ``rows`` of the call read."""
        begin, end, most, pairs = keys.past + rows.start, keys.past + rows.stop, self.size + self.sinks, 0
        for first in keys.starts or [0] * q.shape[0]:
            # A query that sees n keys reads min(n, most) of them: a ramp, then a plateau.
            low, high = max(begin, first) - first + 1, end - first
            top = min(high, most)
            pairs += (low + top) * max(0, top - low + 1) // 2 + most * max(0, high - max(top, low - 1))
        return pairs * q.shape[1]

    def _pairs_here(self, q: Tensor, keys: Keys) -> int:
        """The pairs of the call's queries with keys that are held here."""
        pairs = 0
        for first in keys.starts or [0] * q.shape[0]:
            for row in range(keys.past, keys.length):
                low = max(first, row - self.size + 1)
                pairs += max(0, keys.held(row + 1) - keys.held(low))
                pairs += max(0, keys.held(min(first + self.sinks, low)) - keys.held(first))
        return pairs * q.shape[1]


def first_keys(sinks: int, cols: Tensor, start: Tensor | None, batch: int) -> Tensor:
    """[B, 1, 1, Tk] bool: which of the positions ``cols`` [1, Tk] are among the first ``sinks`` of a row."""
    first = torch.zeros(batch, dtype=torch.long) if start is None else start.cpu()
    return (cols[None] < (first.to(cols.device) + sinks)[:, None, None])[:, None]
