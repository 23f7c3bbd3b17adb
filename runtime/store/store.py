"""KVStore: the keys and values of a layer in growing buffers, with the summaries and states of methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ...attention.attend import DECODE_ROWS
from ...attention.errors import FarspanError
from ...attention.kv import KV
from ...attention.sources import Supply
from ...attention.summary import Summaries, Summary
from .positions import Positions
from .states import States
from .storage import DEVICE, Storage

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def lasting() -> Iterator[None]:
    """A context for tensors that are used after the call. It makes no inference tensors, since these cannot
    be updated outside inference mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def runs_lasting(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which runs in the context ``lasting``. Outside inference mode that costs nothing."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with lasting():
            return function(*args, **kwargs)

    return run


class KVStore:
    """Keys and values [B, Hkv, T] of one layer, appended in place and stored as ``storage`` says.

    The buffers grow geometrically, by an eighth at a time, so that the past is copied once in many tokens.
    The store also keeps the summaries that methods declare, which are extended on append, and the state of
    each method. Both follow every change of the batch rows. Where no method of the layer needs the oldest
    keys, ``forget`` drops them. This class does not use transformers; ``hf/cache.py`` makes a cache layer of
    it.

    length: number of positions whose keys and values are here.
    """

    def __init__(self, storage: Storage = DEVICE) -> None:
        self.storage = storage
        self._buffers: tuple[Tensor, ...] = ()  # the buffers of ``KV.stored``, [B, Hkv, room, any] each
        self._kv: KV | None = None  # the buffers up to ``length``; made on first use
        self._handles: tuple[Tensor, Tensor] | None = None
        self.length = 0
        self.needed: int | None = None  # how many of the last positions later calls need; None: all
        self._dropped = 0
        self.summaries = Summaries()
        self.states = States()
        self.positions = Positions()  # kept only where a method needs keys before RoPE
        self._starts: list[int] | None = None  # where rows begin, by a mask of the first ``_known`` positions
        self._known = 0

    @property
    def dropped(self) -> int:
        """Number of the first positions whose keys and values were dropped."""
        return self._dropped

    @property
    def total(self) -> int:
        """Number of positions of the sequence so far. Over ranks, others hold some of them."""
        return self.dropped + self.length

    @property
    def kv(self) -> KV | None:
        """[B, Hkv, length], views of the buffers; None while the store is empty."""
        if self._kv is None and self._buffers:
            self._kv = self.storage.format(*[x[:, :, : self.length] for x in self._buffers])
        return self._kv

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add keys [B, Hkv, n, D] and values [B, Hkv, n, Dv]."""
        self.extend(self.storage.format.encode(k, v))

    def extend(self, new: KV) -> None:
        """Add keys and values [B, Hkv, n] that are in the store's format already."""
        end = self.length + new.length
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*new.stored, *self._buffers)):
            # Autograd keeps earlier views, so the tensors are joined and not written in place.
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
        """Set the number of stored positions to ``length``."""
        self.length, self._kv, self._handles = length, None, None

    def _grown(self, old: Tensor | None, like: Tensor, need: int) -> Tensor:
        b, h, _, d = like.shape
        buffer = self.storage.memory.empty((b, h, self._room(need), d), like)
        if old is not None:
            buffer[:, :, : self.length] = old[:, :, : self.length]
        return buffer

    def _room(self, need: int) -> int:
        """The positions for which buffers are made that must hold ``need`` and may grow."""
        return need + max(256, need // 8)

    def handles(self) -> tuple[Tensor, Tensor]:
        """Keys [B, Hkv, total, D] and values [B, Hkv, total, Dv] as tensors, by which ``holds`` identifies
        this store.

        In the plain format they are views of the stored tensors. In other formats, and where keys were
        dropped, they have the right shape, but no memory and no contents: decoding all keys at every step
        would cost more than attention.
        """
        kv = self.kv
        assert kv is not None, "the store is empty"
        if type(kv) is KV and not self.dropped:
            return kv.dense()
        if self._handles is None:
            empty = torch.empty(1, dtype=kv.dtype, device=kv.device)
            shape = (kv.batch, kv.num_kv_heads, self.total)
            self._handles = empty.expand(*shape, kv.head_dim), empty.expand(*shape, kv.value_dim)
        return self._handles

    def holds(self, k: Tensor) -> bool:
        """Whether ``k`` is the tensor of keys that this store has returned."""
        if not self._buffers or k.shape[2] != self.total:
            return False
        return k.data_ptr() == (self._handles or self._buffers)[0].data_ptr()

    def align(self, starts: list[int] | None, length: int) -> None:
        """Set the positions at which rows begin, by a mask of the first ``length`` positions. The start of a
        row without a token is ``length``.

        The start of a row is fixed by its first token. Where a later mask gives another start, the state of
        these rows and all summaries are dropped, because they were made with the earlier start.
        """
        starts = [0] * self._rows() if starts is None else starts
        if self._starts is not None and self._starts != starts:
            pairs = zip(self._starts, starts, strict=True)
            moved = [row for row, (old, new) in enumerate(pairs) if min(new, self._known) != old]
            if moved and self.dropped:
                raise FarspanError(
                    f"Another attention mask was given for {self.total} cached tokens, {self.dropped} of "
                    "which have summaries in place of keys: give the mask of the earlier calls, or start a "
                    "new cache."
                )
            if moved:
                self._drop_summaries()
                self.states.drop(moved)
        self._starts, self._known = starts, length

    @property
    def _summaries_of_blocks(self) -> Summaries:
        return self.summaries

    def _drop_summaries(self) -> None:
        self.summaries.clear()

    def crop(self, count: int) -> None:
        """Drop the newest ``count`` positions and the state of every method. A count of 0 changes nothing."""
        if count > 0:
            self._check_crop(count)
            left = max(0, self.total - count)
            if left == 0:
                self._dropped = 0
            self._shorten(left - self.dropped, left)
            self._forget_since(left)

    def _check_crop(self, count: int) -> None:
        """Raise FarspanError where the positions left after a crop are not enough for later calls."""
        left = max(0, self.total - count)
        if left and self.needed is not None and self.dropped > max(0, left + 1 - self.needed):
            raise FarspanError(
                f"This cache cannot be cropped by {count} of {self.total} tokens, because the keys of the "
                f"first {self.dropped} were dropped and the last {self.needed} are needed: start a new cache."
            )
        self._summaries_of_blocks.check_crop(left, self._starts)

    def _shorten(self, length: int, known: int) -> None:
        """Keep the first ``length`` of the stored positions, and what summaries and position ids have of the
        first ``known``."""
        self._resize(length)
        self.summaries.crop(known)
        self.positions.crop(known)

    def require(self, needed: int | None, past: int) -> None:
        """Raise FarspanError where a call whose first query is at position ``past`` needs keys that were
        dropped. needed: how many of the last positions a query needs, its own included; None: all."""
        if self.dropped and (needed is None or self.dropped > max(0, past + 1 - needed)):
            what = "all of them" if needed is None else f"the last {needed}"
            raise FarspanError(
                f"This cache keeps summaries in place of its first {self.dropped} keys, and a layer needs "
                f"{what}: use the cache with the method that has filled it, or start a new cache."
            )

    def forget(self, needed: int) -> None:
        """Drop the keys and values of the oldest positions and release their memory, where later calls need
        those of the last ``needed`` positions only.

        DECODE_ROWS more positions are kept, because assisted decoding may crop that many tokens. They are
        dropped an eighth of ``needed`` at a time, so that the rest is rarely copied.
        """
        self.needed = needed
        if any(x.requires_grad for x in self._buffers):
            return
        keep = needed + DECODE_ROWS
        spare = max(DECODE_ROWS, keep // 8)
        if self.length <= keep + spare:
            return
        gone = self.length - keep
        room = keep + spare + DECODE_ROWS
        self._buffers = tuple(self._grown_rows(x[:, :, gone : self.length], room) for x in self._buffers)
        self._dropped += gone
        self._resize(keep)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the buffers, of the summaries and of the positions kept."""
        buffers = sum([x.nbytes for x in self._buffers])
        return buffers + self.summaries.nbytes + self.positions.nbytes

    def _forget_since(self, length: int) -> None:
        """Drop the states, and the starts of rows that begin after the first ``length`` positions."""
        self.states.clear()
        if self._starts is not None:
            self._known = min(self._known, length)
            self._starts = [min(first, length) for first in self._starts]

    def reset(self) -> None:
        """Empty the store and release its buffers."""
        self._buffers, self._starts = (), None
        self._dropped = 0
        self._resize(0)
        self.summaries.clear()
        self.states.clear()
        self.positions.clear()

    @runs_lasting
    def summarise(self, summary: Summary) -> None:
        """Take all positions into a summary of keys and values, as a later call would do."""
        if self.kv is not None and not self.dropped:
            self.summaries.get(summary, Supply(self.kv), self._starts)

    def held(self) -> dict[str, Any]:
        """All that the store holds, for ``restore``: values as ``tree.split`` takes them. The tensors are
        views of the store's own."""
        return {
            "stored": [x[:, :, : self.length] for x in self._buffers],
            "dropped": self.dropped,
            "needed": self.needed,
            "starts": self._starts,
            "known": self._known,
            "summaries": self.summaries.held(),
            "states": self.states.held(),
            "positions": self.positions.held(),
        }

    @runs_lasting
    def restore(self, held: Mapping[str, Any]) -> None:
        """Fill an empty store with what another one of the same storage held. Keys and values are copied."""
        length = held["stored"][0].shape[2] if held["stored"] else 0
        if length:
            self._buffers = tuple(self._grown_rows(x, self._room(length)) for x in held["stored"])
            self._resize(length)
        self._dropped, self.needed = held["dropped"], held["needed"]
        self._starts, self._known = held["starts"], held["known"]
        self.summaries.restore(held["summaries"])
        self.states.restore(held["states"])
        self.positions.restore(held["positions"])

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
        return self._buffers[0].shape[0] if self._buffers else 0

    def _map(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        if not self._buffers:
            return
        self._kv = self._handles = None
        self._buffers = tuple(self._refilled(x, change(x[:, :, : self.length])) for x in self._buffers)
        self.summaries.map_rows(change)
        self.positions.map_rows(change)
        self.states.map_rows(rows)
        if self._starts is not None:
            self._starts = [self._starts[row] for row in rows]

    def _refilled(self, buffer: Tensor, new: Tensor) -> Tensor:
        """A buffer as large as ``buffer`` that begins with the positions ``new``, of as many rows as
        these."""
        return self._grown_rows(new, buffer.shape[2])

    def _grown_rows(self, x: Tensor, room: int) -> Tensor:
        b, h, t, d = x.shape
        buffer = self.storage.memory.empty((b, h, room, d), x)
        buffer[:, :, :t] = x
        return buffer
