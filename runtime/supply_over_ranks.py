"""What a layer call over ranks has for summaries, and the summaries of its new positions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..attention.kv import KV
from ..attention.method import AttentionMethod
from ..attention.needs import Inputs
from ..attention.sources import IN_NO_CACHE, Recent, Source, Sources, Supply
from ..attention.summary import Summary, recent_positions
from ..parallel.mechanisms.call import Call
from ..parallel.mechanisms.entries import Past, extend, extend_split, last_positions
from ..parallel.mechanisms.gather import gather_rows
from .store.shard import ShardStore


class SupplyOverRanks:
    """What one layer call over ranks has for summaries; it stores the call's keys and extends the summaries.

    It is made before the call's keys are stored. q [B, H, n, D], k, v [B, Hkv, n, D] and ``fed`` are those of
    the positions that this rank has computed in ``call``.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, store: ShardStore, call: Call, fed: Inputs | None
    ) -> None:
        self.store, self.call, self.fed = store, call, fed
        self._own = Supply(KV(k, v), q, fed)
        self._past = Past(store.layout, call.past, self._stored, store.shared.recent, store.ranks)
        self._held = store.length  # positions of this rank before the call
        self._mine: Tensor | None = None

    def take(self) -> None:
        """Store this rank's part of the new keys and values, and of their position ids where a method needs
        RoPE undone."""
        store, call, kv = self.store, self.call, self._own.kv
        if call.split is None:
            self._mine = store.take_shared(kv.k, kv.v)
        else:
            store.take_split(kv.k, kv.v, call.split)
        if self.fed is not None and self.fed.places is not None:
            store.positions.append(
                self._kept_here(self.fed.places[:, None, :, None])[:, 0, :, 0], store.length
            )

    @torch.no_grad()
    def extend_blocks(self, prefill: AttentionMethod, decode: AttentionMethod) -> None:
        """Update the block summaries that the methods declare. Those of the prefill method are needed only in
        a call that is split, unless they read what is in no cache."""
        split, starts, shared = self.call.split, self.call.starts, self.store.shared
        chosen = {s.key: s for s in decode.summaries if s.block is not None}
        for s in prefill.summaries:
            if s.block is not None and (split is not None or s.reads & IN_NO_CACHE):
                chosen[s.key] = s
        declared = list(chosen.values())
        if not declared:
            shared.recent = Recent()
            return
        own = self._sources({name for s in declared for name in s.reads})
        keep = max(map(recent_positions, declared))
        for summary in declared:
            if split is None:
                extend(summary, shared, own, self._past, starts)
            else:
                extend_split(summary, shared, own, self._past, split, starts)
        if split is None:
            shared.recent = self._past.recent.followed_by(own.tensors, self.call.past, keep)
            return
        n = min(keep, split.end - split.begin)
        last = {
            name: last_positions(x, n, split, self.store.ranks, "inputs")
            for name, x in own.tensors.items()
            if name in IN_NO_CACHE
        }
        shared.recent = self._past.recent.followed_by(last, split.end - n, keep)

    @torch.no_grad()
    def extend_labels(self, prefill: AttentionMethod, decode: AttentionMethod) -> None:
        """Update the labels of this rank's positions. Those of keys and values alone wait until they are
        asked for, unless ``gather_labels`` needs them."""
        summaries = self.store.summaries
        for summary in _labels((*prefill.summaries, *decode.summaries)):
            wanted = self.call.split is not None and summary in prefill.summaries
            if not (wanted or summary.reads - {"keys", "values"}):
                continue
            done = summaries.done(summary)
            if summary.reads & IN_NO_CACHE:
                if done < self._held:
                    first = int(self.store.layout.positions(self.store.ranks.rank)[done])
                    Recent().since(min(summary.reads & IN_NO_CACHE), first, self.call.past)
                x = self._sources(summary.reads).map(self._kept_here)
            else:
                x = Sources({name: self._stored(name, done, self.store.length) for name in summary.reads})
            if x.length:
                summaries.extend(summary, x, done, None)
            elif not done:
                like = summary.compute(self._sources(summary.reads).cut(0, 1))
                summaries.room(summary, like, x.batch, 0)

    @torch.no_grad()
    def gather_labels(self, prefill: AttentionMethod) -> dict[tuple, Tensor]:
        """The labels [B, heads, total, width] of all positions that the prefill method declares, on every
        rank; by key."""
        store = self.store
        return {
            s.key: gather_rows(store.summaries.entries(s, store.length), store.layout, store.ranks, "labels")
            for s in _labels(prefill.summaries)
        }

    def _sources(self, names: Iterable[Source]) -> Sources:
        """Those of the positions that this rank has computed; in the same order on every rank."""
        return self._own.sources(sorted(names), 0)

    def _kept_here(self, x: Tensor) -> Tensor:
        """x [B, any, n, any] of the positions that this rank has computed -> of those that it has stored."""
        if self.call.split is not None:
            return self.call.split.real(x, self.store.ranks.rank)
        assert self._mine is not None
        return x[:, :, self._mine]

    def _stored(self, name: Source, a: int, b: int) -> Tensor:
        """What follows from the cache, of this rank's a-th to (b - 1)-th position."""
        kv = self.store.shard.kv[:, :, a:b]
        if name == "keys":
            return kv.k
        if name == "values":
            return kv.v
        undo = None if self.fed is None else self.fed.undo
        if name == "keys_before_rope" and (undo is None or a == b):
            return kv.k
        places = self.store.positions.between(a, b)
        if name == "positions":
            return places[:, None, :, None].long()
        assert undo is not None
        return undo(kv.k, places)


def _labels(declared: Iterable[Summary]) -> list[Summary]:
    return list({s.key: s for s in declared if s.block is None}.values())
