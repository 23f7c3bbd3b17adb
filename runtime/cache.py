"""KVStore: a layer's keys and values in buffers with room to grow, and what methods keep beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..attention.kv import KV
from ..attention.summary import Summaries
from .positions import Positions
from .state import States


@contextmanager
def lasting() -> Iterator[None]:
    """For tensors that outlive the call: were they born as inference tensors, nothing could update them
    later."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


class KVStore:
    """Keys and values [B, Hkv, T] of one layer, appended in place.

    The buffers grow geometrically (an eighth at a time, so an append copies the past once in many tokens, not
    at each one). Beside the rows live the summaries that methods declare, extended on append, and each
    method's state; both follow every change of the rows. Nothing here knows transformers: ``hf.py`` makes it
    a cache layer.
    """

    format: type[KV] = KV  # in which a new store keeps what it is given

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, ...] = ()  # [B, Hkv, room, any] each, those of ``KV.stored``
        self._kv: KV | None = None  # the buffers up to ``length``, once somebody has asked
        self._handles: tuple[Tensor, Tensor] | None = None
        self.length = 0
        self.summaries = Summaries()
        self.states = States()
        self.positions = Positions()  # filled only where a method needs keys before RoPE
        self._starts: list[int] | None = (
            None  # where rows begin, as far as the first ``_known`` positions say
        )
        self._known = 0

    @property
    def total(self) -> int:
        """Positions of the sequence so far; as many as there are rows, if all of them are here."""
        return self.length

    @property
    def kv(self) -> KV | None:
        """[B, Hkv, T], views of the buffers; None while the store is empty."""
        if self._kv is None and self._buffers:
            self._kv = self.format(*[x[:, :, : self.length] for x in self._buffers])
        return self._kv

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add keys [B, Hkv, n, D] and values [B, Hkv, n, Dv]."""
        self.extend(self.format.encode(k, v))

    def extend(self, new: KV) -> None:
        """Add keys and values [B, Hkv, n] that are in the store's format already."""
        end = self.length + new.length
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*new.stored, *self._buffers)):
            # Autograd keeps earlier views alive: join instead of writing in place.
            parts = [part.stored for part in (self.kv, new) if part is not None]
            self._buffers = tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))
            self._resize(end)
            return
        if not self._buffers or end > self._buffers[0].shape[2]:
            olds = self._buffers or (None,) * len(new.stored)
            self._buffers = tuple(self._grown(x, y, end) for x, y in zip(olds, new.stored, strict=True))
        for buffer, x in zip(self._buffers, new.stored, strict=True):
            buffer[:, :, self.length : end] = x
        self._resize(end)

    def _resize(self, length: int) -> None:
        """Hold the first ``length`` positions of the buffers."""
        self.length, self._kv, self._handles = length, None, None

    def _grown(self, old: Tensor | None, like: Tensor, need: int) -> Tensor:
        b, h, _, d = like.shape
        with torch.inference_mode(
            False
        ):  # a buffer born in inference mode could not be written to outside it
            buffer = torch.empty(b, h, need + max(256, need // 8), d, dtype=like.dtype, device=like.device)
        if old is not None:
            buffer[:, :, : self.length] = old[:, :, : self.length]
        return buffer

    def handles(self) -> tuple[Tensor, Tensor]:
        """Keys [B, Hkv, T, D] and values for whoever takes tensors, and by which ``holds`` knows this store.

        In the plain format they are the stored ones. In another one they have the shape alone, no memory and
        no contents: decoding all keys at every step would cost more than attention.
        """
        kv = self.kv
        assert kv is not None, "the store is empty"
        if type(kv) is KV:
            return kv.dense()
        if self._handles is None:
            empty = torch.empty(1, dtype=kv.dtype, device=kv.device)
            self._handles = empty.expand(*kv.shape, kv.head_dim), empty.expand(*kv.shape, kv.value_dim)
        return self._handles

    def holds(self, k: Tensor) -> bool:
        """Whether ``k`` is this store's own view of its keys."""
        if not self._buffers or k.shape[2] != self.length:
            return False
        return k.data_ptr() == (self._handles or self._buffers)[0].data_ptr()

    def align(self, starts: list[int] | None, length: int) -> None:
        """Say where rows begin, by a mask of the first ``length`` positions: at ``length`` those without a
        token.

        A row begins once, when its first token comes. Where a mask says something else than the ones before,
        what was made by those is dropped: the state of the rows that differ, and all summaries.
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
        """Drop the newest ``count`` positions; methods' state is dropped with them, and nothing changes for
        0."""
        if count > 0:
            self._resize(max(0, self.length - count))
            self.summaries.crop(self.length)
            self.positions.crop(self.length)
            self._forget_since(self.total)

    def _forget_since(self, length: int) -> None:
        """Drop what later positions than the first ``length`` have said."""
        self.states.clear()
        if self._starts is not None:
            self._known = min(self._known, length)
            self._starts = [min(first, length) for first in self._starts]

    def reset(self) -> None:
        """Empty the store; its buffers are released."""
        self._buffers, self._starts = (), None
        self._resize(0)
        self.summaries.clear()
        self.states.clear()
        self.positions.clear()

    def reorder(self, rows: Tensor) -> None:
        """Let row i become what row ``rows[i]`` was (beam search)."""
        if rows.numel() != self._rows() or not torch.equal(rows.cpu(), torch.arange(rows.numel())):
            with lasting():
                self._map(lambda x: x.index_select(0, rows.to(x.device)), rows.tolist())

    def select(self, rows: Tensor) -> None:
        """Keep only the rows that ``rows`` (positions or a boolean mask) names."""
        index = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        self.reorder(index)

    def repeat(self, times: int) -> None:
        """Repeat each row ``times`` times, side by side."""
        rows = torch.arange(self._rows()).repeat_interleave(times)
        if times > 1:
            self.reorder(rows)

    def _rows(self) -> int:
        return self._buffers[0].shape[0] if self._buffers else 0

    def _map(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        if not self._buffers:
            return
        self._kv = self._handles = None
        self._buffers = tuple(
            self._grown_rows(change(x[:, :, : self.length]), x.shape[2]) for x in self._buffers
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
