"""H2O: the keys that have received most attention stay, beside the recent ones; the others go for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import require
from ..cost import Cost, Queries
from ..eviction import Eviction
from ..keys import Keys
from ..kv import KV
from ..method import AttentionMethod
from ..ops.select import top_k
from ..selection import Index, TokenIndex
from .accumulated import accumulate, accumulate_all, keep


@dataclass(frozen=True, kw_only=True)
class H2O(AttentionMethod):
    """Decode reads the recent keys and the heavy hitters, those with the most accumulated attention (H2O,
    2306.14048).

    A key's score is the attention that it has received from every query so far, the prompt's included, summed
    over the heads of its group. A step reads k keys: the last k / 2 (rounded up), its own among them, and
    k / 2 heavy hitters. The key that leaves the recent ones joins the heavy hitters, and the heavy hitter
    with the lowest score (of equals the newest) is evicted. The authors also give half of the budget to each.

    Prefill is dense. For the scores every query of the prompt is multiplied with every key once more, which
    costs about as much as dense prefill; over ranks each rank holds all queries meanwhile. Decode never reads
    evicted keys again; a further prompt does. After a crop the next step reads everything and scores by its
    own query. With ``evict`` each step drops them: a further prompt reads the rest, and crops are refused.
    Departures: one set per KV head, where the authors' models have a KV head for every query head; every row
    has its own scores, where the authors' code sums them over the batch.
    """

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O (heavy-hitter oracle)"
    paper: ClassVar[str] = "2306.14048"

    k: int = 1024
    evict: bool = False

    def __post_init__(self) -> None:
        require(self, k=(2, None))

    @property
    def heavy(self) -> int:
        return self.k // 2  # heavy hitters that are kept

    @property
    def recent(self) -> int:
        return self.k - self.heavy  # recent keys that are kept, the query's own among them

    @property
    def observation_window(self) -> None:
        return None

    def reads(self, queries: Queries) -> Cost:
        rows = queries.raw_keys(min(self.k, queries.length))
        return queries.cost(queries.seen.clamp(max=self.k), selection=rows)

    def on_prefill_end(self, q: Tensor, keys: Keys) -> None:
        self._begin(q, keys, keys.length)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        if keys.longest() <= self.k:  # nothing is evicted, and only the scores are kept
            for t in range(keys.tq):
                accumulate_all(q[:, :, t : t + 1], keys, keys.past + t + 1)
            return None
        lists, used, full = [], [], []
        for t in range(keys.tq):
            row, length = q[:, :, t : t + 1], keys.past + t + 1
            full.append("scores" not in keys.state)
            if full[-1]:  # after a crop: this step reads everything
                self._begin(row, keys, length)
            else:
                self._admit(keys, length)
            tokens, count = self._kept(keys, length)
            if not full[-1]:
                rows = accumulate(row, keys, tokens, count)
            lists.append(tokens)
            used.append(count)
        all_read = torch.tensor(full).expand(*lists[0].shape[:2], -1) if any(full) else None  # on the host
        if all(count is None for count in used):
            one = keys.tq == 1 and keys.peers is None and not full[0]
            gathered = KV(rows, keys.kv.gather(lists[0]).v) if one else None
            return TokenIndex(tokens=torch.stack(lists, 2), full=all_read, gathered=gathered)
        whole = torch.full((q.shape[0],), self.k, device=q.device)
        counts = torch.stack([whole if count is None else count for count in used], 1)[:, None]  # [B, 1, Tq]
        return TokenIndex.ragged(torch.stack(lists, 2), counts, full=all_read)

    def eviction(self, keys: Keys, phase: str) -> Eviction | None:
        return keep(self._heavy(keys), self.recent, keys) if keys.length > self.k else None

    def _begin(self, q: Tensor, keys: Keys, length: int) -> None:
        """Accumulate the attention of queries q [B, H, n, D], the last of ``length`` positions, which have
        read every key before them, and choose the heavy hitters anew."""
        sums = accumulate_all(q, keys, length)
        keys.state.pop("heavy", None)
        if length - min(keys.starts or [0]) > self.k:
            ranked = sums[..., : length - self.recent]
            if keys.start is not None:
                padding = torch.arange(ranked.shape[2], device=q.device) < keys.start[:, None, None]
                ranked = ranked.masked_fill(padding, -torch.inf)
            best = top_k(ranked, self.heavy)
            keys.state["heavy"] = torch.where(self._grown(keys, length), best, self._heavy(keys))

    def _heavy(self, keys: Keys) -> Tensor:
        """The heavy hitters [B, Hkv, h]; the first keys of each row where nothing has been evicted yet."""
        if "heavy" in keys.state:
            return keys.state["heavy"]
        first = torch.arange(self.heavy, device=keys.kv.device).expand(*keys.kv.shape[:2], self.heavy)
        return first if keys.start is None else first + keys.start[:, None, None]

    def _grown(self, keys: Keys, length: int) -> Tensor:
        """[B or 1, 1, 1] bool: rows with more keys than the budget."""
        start = 0 if keys.start is None else keys.start[:, None, None]
        return torch.full((1, 1, 1), length, device=keys.kv.device) - start > self.k

    def _admit(self, keys: Keys, length: int) -> None:
        """The key that leaves the recent ones, since the ``length``-th key is new, joins the heavy hitters,
        and one of them leaves."""
        if length - min(keys.starts or [0]) <= self.k:
            return
        heavy, h = self._heavy(keys), self.heavy
        joined = torch.nn.functional.pad(heavy, (0, 1), value=length - 1 - self.recent)  # ascending
        worth = keys.state["scores"].gather(2, joined.clamp(max=length - 1))
        leaves = h - worth.flip(-1).argmin(-1, keepdim=True)  # of equals the newest
        place = torch.arange(h, device=heavy.device)
        stay = joined.gather(2, place + (place >= leaves).long())
        keys.state["heavy"] = torch.where(self._grown(keys, length), stay, heavy)

    def _kept(self, keys: Keys, length: int) -> tuple[Tensor, Tensor | None]:
        """What the ``length``-th query reads, tokens [B, Hkv, k], and how many of them count in each row [B],
        None where all do."""
        heavy, device = self._heavy(keys), keys.kv.device
        recent = torch.arange(length - self.recent, length, device=device).expand(*heavy.shape[:2], -1)
        tokens = torch.cat([heavy, recent], 2)
        counts = [min(self.k, length - first) for first in keys.starts or [0] * heavy.shape[0]]
        if min(counts) == self.k:
            return tokens, None
        for b, count in enumerate(counts):
            if count < self.k:  # nothing has been evicted yet
                tokens[b] = length - count + torch.arange(self.k, device=device) % count
        seen = tokens.new_full((len(counts),), length) if keys.start is None else length - keys.start
        return tokens, seen.clamp(max=self.k)
