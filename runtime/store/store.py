"""KVStore: the keys and values of a layer, with the summaries and states of methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...attention.attend import DECODE_ROWS
from ...attention.errors import FarspanError
from ...attention.eviction import Eviction
from ...attention.kv import KV
from ...attention.parts import Evicted, PartedKV, of_heads
from ...attention.softmax import Softmax
from ...attention.sources import Supply
from ...attention.summary import Summaries, Summary
from .apart import Apart
from .buffers import Buffers
from .guard import Guard
from .lasting import lasting, runs_lasting
from .positions import Positions
from .states import States
from .storage import DEVICE, Storage

# The stored keys and values, the positions at which rows begin, the summaries -> rows [B, Hkv, R]; None: none
Select = Callable[[KV, list[int] | None, Summaries], Tensor | None]


class KVStore:
    """Keys and values [B, Hkv, T] of one layer, appended in place and stored as ``storage`` says.

    The store also keeps the summaries that methods declare, which are extended on append, and the state of
    each method. Both follow every change of the batch rows. Where no method of the layer needs the oldest
    keys, ``forget`` drops them; what a method evicts, each KV head its own keys, ``evict`` drops. This class
    does not use transformers; ``hf/cache.py`` makes a cache layer of it.

    With a packing, ``pack`` rounds whole groups of the positions before its window. Groups begin at multiples
    of their size, counted from the first position that is stored here. So a row in a padded batch has other
    groups than alone, unless its padding is a multiple of them, and so has a rank's part of a sequence:
    results agree up to the rounding of groups. A call reads its own keys as they are, for they are packed
    when it ends, and summaries are computed from these. A crop into a group brings the rest of it back,
    decoded.

    length: number of positions whose keys and values are here; under ``evicted``, of the keys that a KV head
    has at most in any row. evicted: how many of their keys the KV heads have evicted; None: none.
    evicted_by: the method that has evicted some; "" where none has. guard: what packing does to attention.
    """

    def __init__(self, storage: Storage = DEVICE) -> None:
        self.buffers = self.make_buffers(storage)
        self.guard = Guard()
        self._handles: tuple[Tensor, Tensor] | None = None
        self.needed: int | None = None  # how many of the last positions later calls need; None: all
        self._dropped = 0
        self._begin_whole()
        self.summaries = Summaries()
        self.states = States()
        self.positions = Positions()  # kept only where a method needs keys before RoPE
        self._starts: list[int] | None = None  # where rows begin, by a mask of the first ``_known`` positions
        self._known = 0

    def make_buffers(self, storage: Storage) -> Buffers:
        """Empty buffers of this kind of store."""
        return Buffers(storage)

    @property
    def storage(self) -> Storage:
        return self.buffers.storage

    def _begin_whole(self) -> None:
        """No key is evicted."""
        self.evicted: Evicted | None = None
        self.evicted_by = ""
        self._floor = 0  # below so many positions, a crop would need keys that were evicted
        self._apart: Apart[KVStore] | None = None  # KV heads with keys of their own

    @property
    def length(self) -> int:
        return self.buffers.length

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
        kv = self.buffers.kv
        return kv if kv is None or self._apart is None else PartedKV(self._apart.parts(kv), self.total)

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add keys [B, Hkv, n, D] and values [B, Hkv, n, Dv]."""
        self.extend(self.storage.format.encode(k, v))

    def extend(self, new: KV) -> None:
        """Add keys and values [B, Hkv, n] that are in the storage's format already."""
        if self._apart is not None:
            self._apart.store.extend(of_heads(new, self._apart.heads))
            new = of_heads(new, self._apart.others)
        self.buffers.extend(new)
        self._handles = None

    def settle(self) -> None:
        """End a call of the layer: free what it has brought out of another memory."""
        self.buffers.settle()

    def pack(self, q: Tensor, softmax: Softmax, start: Tensor | None = None) -> None:
        """With a packing, pack the whole groups before the window, at the end of a call of queries q
        [B, H, Tq, D] at the last positions. start: [B], where rows begin; None: no row is padded."""
        if self.buffers.packed is not None:
            with lasting():
                self.guard.pack(self.buffers, q, softmax, start, self.places)
            self._handles = None

    def places(self, device: torch.device) -> Tensor:
        """[length] int64, the positions whose keys and values are here."""
        return torch.arange(self.dropped, self.dropped + self.length, device=device)

    def prefetch(self, select: Select, given: tuple[Tensor, ...]) -> None:
        """Begin to bring the rows that ``select`` names to the device, where they are not there. given: the
        tensors that ``select`` reads besides."""
        self.buffers.prefetch(lambda kv: select(kv, self._starts, self.summaries), given)

    def handles(self) -> tuple[Tensor, Tensor]:
        """Keys [B, Hkv, total, D] and values [B, Hkv, total, Dv] as tensors, by which ``holds`` identifies
        this store.

        Plain numbers on the device are views of the stored tensors. Otherwise, and where keys were dropped,
        they have the right shape, but no memory and no contents: decoding all keys at every step would cost
        more than attention.
        """
        kv = self.kv
        assert kv is not None, "the store is empty"
        if type(kv) is KV and not self.dropped and self.buffers.here:
            return kv.dense()
        if self._handles is None:
            empty = torch.empty(1, dtype=kv.dtype, device=kv.device)
            shape = (kv.batch, kv.num_kv_heads, self.total)
            self._handles = empty.expand(*shape, kv.head_dim), empty.expand(*shape, kv.value_dim)
        return self._handles

    def holds(self, k: Tensor) -> bool:
        """Whether ``k`` is the tensor of keys that this store has returned."""
        if not self.buffers.tensors or k.shape[2] != self.total:
            return False
        return k.data_ptr() == (self._handles or self.buffers.tensors)[0].data_ptr()

    def align(self, starts: list[int] | None, length: int) -> None:
        """Set the positions at which rows begin, by a mask of the first ``length`` positions. The start of a
        row without a token is ``length``.

        The start of a row is fixed by its first token. Where a later mask gives another start, the state of
        these rows and all summaries are dropped, because they were made with the earlier start.
        """
        starts = [0] * self.buffers.batch if starts is None else starts
        if self._starts is not None and self._starts != starts:
            pairs = zip(self._starts, starts, strict=True)
            moved = [row for row, (old, new) in enumerate(pairs) if min(new, self._known) != old]
            if moved and (self.dropped or self.evicted_by):
                lost = "some" if self.evicted_by else str(self.dropped)
                raise FarspanError(
                    f"Another attention mask was given for {self.total} cached tokens, the keys of {lost} of "
                    "which were dropped: give the mask of the earlier calls, or start a new cache."
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
                return self.reset()  # a next sequence may have another number of rows
            self._shorten(left - self.dropped, left)
            self._forget_since(left)

    def _check_crop(self, count: int) -> None:
        if why := self.why_not_cropped(max(0, self.total - count)):
            raise FarspanError(why)

    def why_not_cropped(self, left: int) -> str:
        """Why this store cannot be cropped to its first ``left`` positions; "" where it can."""
        what = f"This cache cannot be cropped by {self.total - left} of {self.total} tokens, because"
        if 0 < left < min(self._floor, self.total):
            return (
                f"{what} {self.evicted_by} has evicted keys for the first {self._floor}: start a new cache."
            )
        needed = self.needed
        if 0 < left < self.total and needed is not None and self.dropped > max(0, left + 1 - needed):
            lost = f"the keys of the first {self.dropped} were dropped and the last {needed} are needed"
            return f"{what} {lost}: start a new cache."
        return self._summaries_of_blocks.why_not_cropped(left, self._starts)

    def _shorten(self, length: int, known: int) -> None:
        """Keep the first ``length`` of the stored positions, and what summaries and position ids have of the
        first ``known``."""
        if self._apart is not None:
            self._apart.store._shorten(self._apart.store.length - (self.length - length), 0)
        self.buffers.shorten(length)
        self._handles = None
        self.summaries.crop(known)
        self.positions.crop(known)

    def require(self, needed: int | None, past: int, evicting: str = "") -> None:
        """Raise FarspanError where a call whose first query is at position ``past`` needs keys that were
        dropped. needed: how many of the last positions a query needs, its own included; None: all. evicting:
        the method of the call that reads what it has left of the keys; "" for none."""
        if self.evicted_by and self.evicted_by != evicting:
            raise FarspanError(
                f"This cache has the keys that {self.evicted_by} has not evicted, and no others: use it with "
                "that method, or start a new cache."
            )
        if self.dropped and not evicting and (needed is None or self.dropped > max(0, past + 1 - needed)):
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
        if any(x.requires_grad for x in self.buffers.tensors):
            return
        keep = needed + DECODE_ROWS
        spare = max(DECODE_ROWS, keep // 8)
        if self.length > keep + spare:
            self._dropped += self.buffers.drop_first(self.length - keep, keep + spare + DECODE_ROWS)
            self._handles = None

    def evict(self, eviction: Eviction, by: str, start: Tensor | None) -> None:
        """Drop the keys and values that ``eviction`` does not name, for the method ``by``, and release their
        memory. Summaries are made anew of those that are left. start: [B], where rows begin; None: no row is
        padded."""
        store = self if eviction.heads is None else self._set_apart(eviction.heads)
        store._keep(eviction.slots, self._starts or [0] * self.buffers.batch, start)
        self._handles = None
        self.evicted_by, self._floor = by, max(self._floor, self.total - eviction.crop)
        self._drop_summaries()

    def _set_apart(self, heads: tuple[int, ...]) -> KVStore:
        """The store of these KV heads, which from now on have keys of their own."""
        if self._apart is None:
            kv, store = self.kv, KVStore(self.storage)
            assert kv is not None
            others = [head for head in range(kv.num_kv_heads) if head not in heads]
            store.extend(of_heads(kv, heads))
            self.buffers.keep_heads(others, self.length + max(DECODE_ROWS, self.length // 32))
            self._apart = Apart(list(heads), others, store)
        return self._apart.store

    def _keep(self, slots: Tensor, starts: list[int], start: Tensor | None) -> None:
        """Keep the keys at ``slots`` [B, Hkv, R] of rows that begin at ``starts``; of a row that has fewer
        keys than R, those in the last places."""
        most = self.total - slots.shape[2]  # that a row without padding can have lost
        there = None if start is None else (most - start).clamp(min=0)
        kept = self._gathered(slots)
        self.evicted = Evicted([max(0, most - first) for first in starts], there)
        self.buffers.keep(kept, kept.length + max(2 * DECODE_ROWS, kept.length // 8))
        self._dropped = most
        self._handles = None

    def views(self) -> dict[int, Buffers]:
        """By the id of its buffers, a ``view`` of them: for a deepcopy that copies no keys and values."""
        apart = {} if self._apart is None else self._apart.store.views()
        return {id(self.buffers): self.buffers.view(), **apart}

    def _gathered(self, slots: Tensor) -> KV:
        """The keys and values at ``slots`` [B, Hkv, R]."""
        assert self.kv is not None
        return self.kv.gather(slots)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, of the summaries and of the positions kept, in all memories."""
        return sum(self.tiers.values())

    @property
    def tiers(self) -> dict[str, int]:
        """``nbytes`` by the tier of the memory, such as "device" and "disk"."""
        tiers = Counter(self.buffers.tiers)
        tiers.update({} if self._apart is None else self._apart.store.tiers)
        tiers["device"] += self.summaries.nbytes + self.positions.nbytes
        return tiers

    def _forget_since(self, length: int) -> None:
        """Drop the states, and the starts of rows that begin after the first ``length`` positions."""
        self.states.clear()
        if self._starts is not None:
            self._known = min(self._known, length)
            self._starts = [min(first, length) for first in self._starts]

    def reset(self) -> None:
        """Empty the store and release its buffers."""
        self._starts, self._dropped = None, 0
        self._begin_whole()
        self.buffers.clear()
        self._handles = None
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
            "buffers": self.buffers.held(),
            "guard": self.guard.error,
            "dropped": self.dropped,
            "needed": self.needed,
            "evicted": None if self.evicted is None else (self.evicted.counts, self.evicted.there),
            "evicted_by": self.evicted_by,
            "floor": self._floor,
            "apart": None if self._apart is None else (self._apart.heads, self._apart.others),
            "apart_held": None if self._apart is None else self._apart.store.held(),
            "starts": self._starts,
            "known": self._known,
            "summaries": self.summaries.held(),
            "states": self.states.held(),
            "positions": self.positions.held(),
        }

    @runs_lasting
    def restore(self, held: Mapping[str, Any]) -> None:
        """Fill an empty store with what another one of the same storage held. Keys and values are copied."""
        self.buffers.restore(held["buffers"])
        self._handles = None
        self.guard.error = held["guard"]
        self._dropped, self.needed = held["dropped"], held["needed"]
        self.evicted = None if held["evicted"] is None else Evicted(*held["evicted"])
        self.evicted_by, self._floor = held["evicted_by"], held["floor"]
        if held["apart"] is not None:
            heads, others = held["apart"]
            self._apart = Apart(heads, others, KVStore(self.storage))
            self._apart.store.restore(held["apart_held"])
        self._starts, self._known = held["starts"], held["known"]
        self.summaries.restore(held["summaries"])
        self.states.restore(held["states"])
        self.positions.restore(held["positions"])

    def reorder(self, rows: Tensor) -> None:
        """Replace batch row i by row ``rows[i]`` (beam search)."""
        if rows.numel() != self.buffers.batch or not torch.equal(rows.cpu(), torch.arange(rows.numel())):
            with lasting():
                self._map(lambda x: x.index_select(0, rows.to(x.device)), rows.tolist())

    def select(self, rows: Tensor) -> None:
        """Keep only the batch rows in ``rows``, which is a list of row numbers or a boolean mask."""
        self.reorder(rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows)

    def repeat(self, times: int) -> None:
        """Repeat each batch row ``times`` times. The copies of a row are neighbours."""
        if times > 1:
            self.reorder(torch.arange(self.buffers.batch).repeat_interleave(times))

    def _map(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        if not self.total:
            return
        self._handles = None
        self.buffers.map_rows(change)
        if self._apart is not None:
            self._apart.store._map(change, rows)
        if self.evicted is not None:
            there = None if self.evicted.there is None else change(self.evicted.there)
            self.evicted = Evicted([self.evicted.counts[row] for row in rows], there)
        self.summaries.map_rows(change)
        self.positions.map_rows(change)
        self.states.map_rows(rows)
        if self._starts is not None:
            self._starts = [self._starts[row] for row in rows]
