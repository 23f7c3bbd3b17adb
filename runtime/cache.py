"""KVStore: the keys and values of a layer in growing buffers, with the summaries and states of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..attention.summary import Summaries
from .positions import Positions
from .state import States


@contextmanager
def lasting() -> Iterator[None]:
    """A context for tensors that are used after the call. It makes no inference tensors, since these cannot
    be updated outside inference mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class KVStore:
    """Keys and values [B, Hkv, T, D] of one layer, appended in place.

    The buffers grow geometrically, by an eighth at a time, so that the past is copied once in many tokens.
    The store also keeps the summaries that methods declare, which are extended on append, and the state of
    each method. Both follow every change of the batch rows. This class does not use transformers;
    ``hf/cache.py`` makes a cache layer of it.
    """

    def __init__(self) -> None:
        self._k: Tensor | None = None  # [B, Hkv, room, D]
        self._v: Tensor | None = None
        self.length = 0
        self.summaries = Summaries()
        self.states = States()
        self.positions = Positions()  # kept only where a method needs keys before RoPE
        self._starts: list[int] | None = None  # where rows begin, by a mask of the first ``_known`` positions
        self._known = 0

    @property
    def total(self) -> int:
        """Number of positions of the sequence so far; here it is ``length``, over ranks it is larger."""
        return self.length

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, T, D], a view of the buffer; None while the store is empty."""
        return None if self._k is None else self._k[:, :, : self.length]

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, T, D], a view of the buffer; None while the store is empty."""
        return None if self._v is None else self._v[:, :, : self.length]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows [B, Hkv, n, D] and return views of all keys and values."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad or self._needs_grad()):
            # Autograd keeps earlier views, so the tensors are joined and not written in place.
            past = [] if self.keys is None or self.values is None else [(self.keys, self.values)]
            self._k = torch.cat([p[0] for p in past] + [k], 2)
            self._v = torch.cat([p[1] for p in past] + [v], 2)
            self.length = self._k.shape[2]
            return self._k, self._v
        new = self.length + k.shape[2]
        if self._k is None or self._v is None or new > self._k.shape[2]:
            self._k, self._v = self._grown(self._k, k, new), self._grown(self._v, v, new)
        self._k[:, :, self.length : new] = k
        self._v[:, :, self.length : new] = v
        self.length = new
        return self._k[:, :, :new], self._v[:, :, :new]

    def _needs_grad(self) -> bool:
        return self._k is not None and self._k.requires_grad

    def _grown(self, old: Tensor | None, like: Tensor, need: int) -> Tensor:
        b, h, _, d = like.shape
        with torch.inference_mode(
            False
        ):  # a buffer that is made in inference mode could not be written outside it
            buffer = torch.empty(b, h, need + max(256, need // 8), d, dtype=like.dtype, device=like.device)
        if old is not None:
            buffer[:, :, : self.length] = old[:, :, : self.length]
        return buffer

    def holds(self, k: Tensor) -> bool:
        """Whether ``k`` is the view of this store's keys."""
        return self._k is not None and k.shape[2] == self.length and k.data_ptr() == self._k.data_ptr()

    def align(self, starts: list[int] | None, length: int) -> None:
        """Set the positions at which rows begin, by a mask of the first ``length`` positions. The start of a
        row without a token is ``length``.

        The start of a row is fixed by its first token. Where a later mask gives another start, the state of
        these rows and all summaries are dropped, because they were made with the earlier start.
        """
        starts = [0] * self._rows() if starts is None else starts
        if self._starts is not None:
            pairs = zip(self._starts, starts, strict=True)
            moved = [row for row, (old, new) in enumerate(pairs) if min(new, self._known) != old]
            if moved:
                self._drop_summaries()
                self.states.drop(moved)
        self._starts, self._known = starts, length

    def _drop_summaries(self) -> None:
        self.summaries.clear()

    def crop(self, count: int) -> None:
        """Drop the newest ``count`` positions and the state of every method. A count of 0 changes nothing."""
        if count > 0:
            self.length = max(0, self.length - count)
            self.summaries.crop(self.length)
            self.positions.crop(self.length)
            self._forget_since(self.total)

    def _forget_since(self, length: int) -> None:
        """Drop the states, and the starts of rows that begin after the first ``length`` positions."""
        self.states.clear()
        if self._starts is not None:
            self._known = min(self._known, length)
            self._starts = [min(first, length) for first in self._starts]

    def reset(self) -> None:
        """Empty the store and release its buffers."""
        self._k = self._v = self._starts = None
        self.length = 0
        self.summaries.clear()
        self.states.clear()
        self.positions.clear()

    def reorder(self, rows: Tensor) -> None:
        """Replace batch row i by row ``rows[i]`` (beam search)."""
        if rows.numel() != self._rows() or not torch.equal(rows.cpu(), torch.arange(rows.numel())):
            with lasting():
                self._map(lambda x: x.index_select(0, rows.to(x.device)), rows.tolist())

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows in ``rows``, which is a list of row numbers or a boolean mask."""
        index = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        self.reorder(index)

    def repeat(self, times: int) -> None:
        """Repeat each batch row ``times`` times. The copies of a row are neighbours."""
        rows = torch.arange(self._rows()).repeat_interleave(times)
        if times > 1:
            self.reorder(rows)

    def _rows(self) -> int:
        return 0 if self._k is None else self._k.shape[0]

    def _map(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        if self._k is None or self._v is None:
            return
        self._k, self._v = (
            self._grown_rows(change(x[:, :, : self.length]), x.shape[2]) for x in (self._k, self._v)
        )
        self.summaries.map_rows(change)
        self.positions.map_rows(change)
        self.states.map_rows(rows)
        if self._starts is not None:
            self._starts = [self._starts[row] for row in rows]

    def _grown_rows(self, x: Tensor, room: int) -> Tensor:
        b, h, t, d = x.shape
        with torch.inference_mode(False):
            buffer = torch.empty(b, h, room, d, dtype=x.dtype, device=x.device)
        buffer[:, :, :t] = x
        return buffer
