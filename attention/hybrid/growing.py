"""The part of a mixer's state that grows with the number of tokens, such as keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where the tokens of a call stand in their rows, padding not counted.

    position: [B, T], for a token the number of tokens before it in its row, and for padding that of the last
    token before it (-1 without one). real: [B, T] bool, False at padding. end: [B], the number of tokens of
    each row after the call.
    """

    position: Tensor
    real: Tensor
    end: Tensor


def places(tokens: Tensor, mask: Tensor | None, length: int) -> Places:
    """The places of a call of ``length`` tokens on rows that have had ``tokens`` [B]. mask: [B, T] bool,
    False at padding; None where there is none."""
    real = torch.ones(len(tokens), length, dtype=torch.bool, device=tokens.device) if mask is None else mask
    position = tokens[:, None] + real.cumsum(1) - 1
    return Places(position, real, tokens + real.sum(1))


@dataclass(frozen=True, kw_only=True)
class Growing:
    """A state part [B, n, *shape] with one entry for each ``every`` tokens of a row: entry e is made by the
    row's token ``(e + 1) * every - 1``. Padding is not counted. A row of t tokens has t // every entries;
    longer rows of the batch may leave room behind them, whose content means nothing."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    every: int = 1

    def bytes_after(self, tokens: int) -> int:
        """Bytes of one row's entries after ``tokens`` tokens."""
        return tokens // self.every * math.prod(self.shape) * self.dtype.itemsize

    def append(self, entries: Tensor, new: Tensor, at: Places) -> Tensor:
        """The entries [B, n', *shape] after a call. new: [B, T, *shape], what each token of the call would
        leave; those that ``every`` passes over are dropped. ``entries`` is not written to."""
        keep = at.real & (at.position % self.every == self.every - 1)
        return self._put(entries, new, keep, at.position // self.every)

    def own(self, new: Tensor, at: Places) -> Tensor:
        """The entries [B, n, *shape] that a call alone has made, each row's first one in front."""
        before = (at.end - at.real.sum(1)) // self.every * self.every
        at = at._replace(position=at.position - before[:, None])
        return self.append(new.new_zeros(len(new), 0, *self.shape, dtype=self.dtype), new, at)

    def join(self, entries: Tensor, own: Tensor, tokens: Tensor, end: Tensor) -> Tensor:
        """The entries of rows of ``tokens`` [B] tokens, followed by those that a call has made (``own``),
        with which a row has ``end`` [B] tokens."""
        before, index = tokens // self.every, torch.arange(own.shape[1], device=own.device)
        keep = index < (end // self.every - before)[:, None]
        return self._put(entries, own, keep, before[:, None] + index)

    def _put(self, entries: Tensor, new: Tensor, keep: Tensor, slots: Tensor) -> Tensor:
        """``entries`` [B, n', *shape] with new [B, m, *shape] at ``slots`` [B, m], where ``keep`` [B, m]."""
        rows, columns = keep.nonzero(as_tuple=True)
        if len(rows) == 0:
            return entries
        slots = slots[rows, columns]
        more = max(0, int(slots.max()) + 1 - entries.shape[1])
        room = entries.new_zeros(len(entries), more, *self.shape)
        return torch.cat([entries, room], 1).index_put_((rows, slots), new[rows, columns].to(entries.dtype))
