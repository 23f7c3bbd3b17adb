"""ShardStore: the part of a layer's KV cache that is stored on one rank."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor

from ...attention.kv import KV
from ...attention.summary import Summaries
from ...parallel.group.comm import Ranks
from ...parallel.mechanisms.call import Call, Shard
from ...parallel.mechanisms.gather import regathered
from ...parallel.mechanisms.layout import Layout, Split
from .storage import DEVICE, Storage
from .store import KVStore

running: ContextVar[Call | None] = ContextVar("running", default=None)  # the present call over ranks


class ShardStore(KVStore):
    """A KVStore that holds some of a sequence's positions. Other ranks hold the other positions.

    length: number of positions on this rank. total: number of positions on all ranks.
    layout: which rank holds which positions; it is the same on every rank.
    shared: block summaries of all positions, and what is kept for them; every rank has all of it.

    KV heads evict different keys, so an eviction divides those that are left among the ranks again. From then
    on ``layout`` and ``shared`` count positions over the keys that are left.
    """

    def __init__(
        self, ranks: Ranks, block: int, window: int | None = None, storage: Storage = DEVICE
    ) -> None:
        super().__init__(storage)
        self.ranks, self.block, self.needed = ranks, block, window
        self.layout = Layout.empty(ranks.size)
        self.shared = Summaries()
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    @property
    def gone(self) -> int:
        """How many keys each KV head has evicted in a row without padding."""
        return self._dropped

    @property
    def dropped(self) -> int:
        return self.gone + self.layout.begin

    @property
    def tiers(self) -> dict[str, int]:
        tiers = super().tiers
        tiers["device"] += self.shared.nbytes
        return tiers

    @property
    def shard(self) -> Shard:
        """The keys and values on this rank, with the layout."""
        assert self.kv is not None
        return Shard(self.kv, self.layout)

    def take_shared(self, k: Tensor, v: Tensor) -> Tensor:
        """Store this rank's part of new keys and values [B, Hkv, t, D] that every rank has. The layout is
        block-cyclic: each block goes to the rank that holds the fewest positions. Returns which of the t
        positions the rank has stored, [n] int64."""
        begin = self.total - self.gone
        end = begin + k.shape[2]
        layout = self.layout.block_cyclic(begin, end, self.block)
        mine = layout.cut(begin, end).positions(self.ranks.rank, k.device) - begin
        self._take(k[:, :, mine], v[:, :, mine], layout, end + self.gone)
        return mine

    def places(self, device: torch.device) -> Tensor:
        return self.layout.positions(self.ranks.rank, device)

    def take_split(self, k: Tensor, v: Tensor, split: Split) -> None:
        """Store the keys and values [B, Hkv, split.rows, D] that this rank has computed, without the padding
        of the split, which counts positions as ``layout`` does."""
        rank = self.ranks.rank
        layout = self.layout.extended(split.layout())
        self._take(split.real(k, rank), split.real(v, rank), layout, split.end + self.gone)

    def _take(self, k: Tensor, v: Tensor, layout: Layout, end: int) -> None:
        self.append(k, v)
        self.layout, self._total = layout, end
        assert self.layout.count(self.ranks.rank) == self.length

    def replace(self, shard: Shard) -> None:
        """Replace the stored keys and values by ``shard``."""
        self.buffers.clear()
        self.extend(shard.kv)
        self.layout = shard.layout
        assert self.layout.count(self.ranks.rank) == self.length

    def _gathered(self, slots: Tensor) -> KV:
        into = Layout.empty(self.ranks.size).block_cyclic(0, slots.shape[2], self.block)
        kept = self.shard.kv.map(lambda x: regathered(x, self.layout, slots, into, self.ranks))
        self.layout = into
        return kept

    @property
    def _summaries_of_blocks(self) -> Summaries:
        return self.shared

    def _drop_summaries(self) -> None:
        super()._drop_summaries()
        self.shared.clear()

    def crop(self, count: int) -> None:
        if count <= 0:
            return
        self._check_crop(count)
        if count >= self.total:
            return self.reset()
        self._total = self.total - count
        left = self.total - self.gone
        here = self.layout.below(self.ranks.rank, left)
        self.layout = self.layout.cut(0, left)
        self.shared.crop(left)
        self._shorten(here, here)
        self._forget_since(self.total)

    def reset(self) -> None:
        super().reset()
        self.layout, self._total = Layout.empty(self.ranks.size), 0
        self.shared.clear()

    def holds(self, k: Tensor) -> bool:
        return False  # k is computed in the call; the stored keys are read by position

    def _map(self, change: Callable[[Tensor], Tensor], rows: list[int]) -> None:
        super()._map(change, rows)
        self.shared.map_rows(change)
