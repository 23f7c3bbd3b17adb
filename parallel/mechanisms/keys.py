"""The keys of a decode call that are sharded over ranks, as a method sees them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...attention.keys import Keys, Peers, State
from ...attention.ops.select import top_k
from ...attention.some_rows import SomeRows
from ...attention.sources import Supply
from ...attention.summary import Summaries, Summary
from ..group.comm import Ranks, pack, unpack
from .layout import Layout


@dataclass(kw_only=True)
class ShardedKeys(Keys):
    """The keys of a decode call: kv [B, Hkv, N] are the N of ``total`` keys that this rank holds.

    shared: the entries of block summaries of all keys, the same on every rank, so that a method which selects
    by them selects as on one device. ``summaries`` has the labels of single keys, for this rank's keys alone.
    """

    total: int
    layout: Layout
    ranks: Ranks
    shared: Summaries

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peers: Peers | None = RankPeers(self.ranks, self.layout, self.places())

    @property
    def length(self) -> int:
        return self.total

    def held(self, length: int) -> int:
        return self.layout.below(self.ranks.rank, length)

    @cached_property
    def _places(self) -> Tensor:
        return self.layout.positions(self.ranks.rank, self.kv.device)

    def places(self) -> Tensor:
        return self._places

    def some_rows(self, rows: slice, state: State) -> ShardedKeys:
        some = super().some_rows(rows, state)
        assert isinstance(some, ShardedKeys)
        return dataclasses.replace(some, shared=SomeRows(self.shared, Supply(self.kv), None, rows))

    def entries(self, summary: Summary) -> Tensor:
        if summary.block is None:
            return self.summaries.get(summary, self._supply(), None)
        assert self.shared.done(summary) == self.total, "block summaries are extended before selection"
        return self.shared.entries(summary, self.total)


@dataclass
class RankPeers:
    """The other ranks of a decode call. Every method is one collective, so all ranks must make the same calls
    in the same order."""

    ranks: Ranks
    layout: Layout
    places: Tensor = field(repr=False)

    def softmax(self, logits: Tensor) -> Tensor:
        """The normaliser is summed in the order of the ranks, so that its bits are the same on every rank."""
        none = logits.new_full(logits.shape[:-1], -torch.inf)
        local = torch.logsumexp(logits, -1) if logits.shape[-1] else none
        whole = torch.logsumexp(self.ranks.all_gather(local, "normaliser"), 0)
        whole = torch.where(whole == -torch.inf, 0.0, whole)
        return torch.exp(logits - whole[..., None])

    def candidates(self, ranked: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Each rank sends its ``size`` highest-ranked keys: 12 bytes each where scores are float64, else
        8."""
        room = min(size, max(self.layout.count(r) for r in range(self.ranks.size)))
        here = top_k(ranked, min(room, ranked.shape[-1])) if ranked.shape[-1] else ranked.long()
        padding = (0, room - here.shape[-1])
        values = torch.nn.functional.pad(ranked.gather(-1, here), padding, value=-torch.inf)
        places = torch.nn.functional.pad(self.places[here], padding, value=self.layout.length).int()
        every = self.ranks.all_gather(pack(values, places), "candidates")
        values, places = (x.movedim(0, -2).flatten(-2) for x in unpack(every, values, places))
        order = places.argsort(dim=-1, stable=True)
        return values.gather(-1, order), places.gather(-1, order).long().clamp_(max=self.layout.length - 1)

    def sum(self, x: Tensor) -> Tensor:
        """Summed in the order of the ranks, so that the bits are the same on every rank."""
        return self.ranks.all_gather(x, "sum").sum(0)

    def share(self, count: int) -> range:
        rank, size = self.ranks.rank, self.ranks.size
        return range(count * rank // size, count * (rank + 1) // size)

    def gather(self, x: Tensor, length: int) -> Tensor:
        layout = self.layout.cut(0, length)
        room = max(layout.count(r) for r in range(self.ranks.size))
        every = self.ranks.all_gather(torch.nn.functional.pad(x, (0, room - x.shape[-1])), "scores")
        whole = x.new_empty(*x.shape[:-1], length)
        for rank in range(self.ranks.size):
            whole[..., layout.positions(rank, x.device)] = every[rank, ..., : layout.count(rank)]
        return whole
