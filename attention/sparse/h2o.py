"""H2O: the keys that have received most attention stay, beside the recent ones; the others go for good."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..cost import Cost, Queries
from ..index import Index, TokenIndex
from ..keys import Keys
from ..kv import KV
from ..method import AttentionMethod, require
from ..ops.scores import scores
from ..ops.select import top_k
from ..received import attention_received


@dataclass(frozen=True, kw_only=True)
class H2O(AttentionMethod):
    """Decode reads the heavy hitters, the keys with the most accumulated attention, and the recent ones (H2O,
    2306.14048).

    A key's score is the attention that every query so far has paid it, the prompt's included, summed over the
    heads of its group. A step reads k keys: the last k / 2 (rounded up), its own among them, and k / 2 heavy
    hitters. The key that leaves the recent ones joins the heavy hitters, and the one with the lowest score of
    them is evicted (the newest of equals). Half of the budget for each is the authors' choice.

    Prefill is dense; to learn the scores, every query of the prompt is multiplied with every key once more,
    about what dense prefill costs, and over ranks each has all queries for a moment. The evicted keys stay in
    the store but are never named again: it saves reads, not memory. A further prompt reads all of them
    (prefill is dense) and adds to their scores. After a crop the next step reads everything and scores by its
    own query.
    Departures: one set per KV head, where the authors have a KV head for every query head; scores of their
    code are summed over the batch, here every row has its own.
    """

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O (heavy-hitter oracle)"
    paper: ClassVar[str] = "2306.14048"

    k: int = 1024

    def __post_init__(self) -> None:
        require(self, k=(2, None))

    @property
    def heavy(self) -> int:
        """Heavy hitters that are kept."""
        return self.k // 2

    @property
    def recent(self) -> int:
        """Recent keys that are kept, the query's own among them."""
        return self.k - self.heavy

    @property
    def observation_window(self) -> None:
        return None

    def reads(self, queries: Queries) -> Cost:
        return queries.cost(queries.seen.clamp(max=self.k), selection=queries.raw_keys(self.k))

    def on_prefill_end(self, q: Tensor, keys: Keys) -> None:
        self._begin(q, keys, keys.length)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        lists, used, full = [], [], []
        for t in range(keys.tq):
            row, length = q[:, :, t : t + 1], keys.past + t + 1
            full.append("scores" not in keys.state)
            if full[-1]:  # after a crop: this step reads everything
                self._begin(row, keys, length)
            else:
                self._admit(keys, length)
            tokens, counts = self._kept(keys, length)
            if not full[-1]:
                rows = self._score(row, keys, tokens, counts)
            lists.append(tokens)
            used.append(counts)
        if keys.longest() <= self.k:
            return None
        device, shape = q.device, (q.shape[0], keys.kv.num_kv_heads, keys.tq)
        index = TokenIndex(
            tokens=torch.stack(lists, 2),
            full=torch.tensor(full, device=device).expand(shape) if any(full) else None,
            gathered=KV(rows, keys.kv.gather(lists[0]).v)
            if keys.tq == 1 and keys.peers is None and not full[0]
            else None,
        )
        if min(map(min, used)) == self.k:
            return index
        count = torch.tensor(used, dtype=torch.int, device=device).T[:, None]  # [B, 1, Tq]
        return replace(index, counts=count.expand(shape))

    def _begin(self, q: Tensor, keys: Keys, length: int) -> None:
        """Take queries q [B, H, n, D], the last of ``length`` positions, which have read everything before
        them, into the scores, and say anew who the heavy hitters are."""
        h, firsts, device = self.heavy, keys.starts or [0] * q.shape[0], q.device
        sums = self._scores(keys, length, q)
        sums[..., :length] += attention_received(q, keys, length).sum(2)
        whole = torch.arange(h, device=device).expand(*sums.shape[:2], h)  # of a row that has evicted nothing
        whole = whole + torch.tensor(firsts, device=device)[:, None, None]
        if length - min(firsts) > self.k:
            ranked = sums[..., : length - self.recent]
            if keys.start is not None:
                padding = torch.arange(ranked.shape[2], device=device) < keys.start[:, None, None]
                ranked = ranked.masked_fill(padding, -torch.inf)
            whole = torch.where(self._grown(keys, length), top_k(ranked, h), whole)
        keys.state["heavy"] = whole

    def _scores(self, keys: Keys, length: int, like: Tensor) -> Tensor:
        """[B, Hkv, more than length], with room to grow; the last place is for what does not count."""
        old = keys.state.get("scores")
        if old is None or old.shape[2] <= length:
            wide = torch.float64 if like.dtype == torch.float64 else torch.float32
            room = length + max(64, length // 8)
            new = torch.zeros(*keys.kv.shape[:2], room, dtype=wide, device=like.device)
            if old is not None:
                new[..., : old.shape[2]] = old
            keys.state["scores"] = new
        return keys.state["scores"]

    def _grown(self, keys: Keys, length: int) -> Tensor:
        """[B or 1, 1, 1] bool: rows with more keys than the budget."""
        start = 0 if keys.start is None else keys.start[:, None, None]
        return torch.full((1, 1, 1), length, device=keys.kv.device) - start > self.k

    def _admit(self, keys: Keys, length: int) -> None:
        """The key that the newest one, the ``length``-th, drives out of the recent ones joins the heavy
        hitters, and one of them leaves."""
        if length - min(keys.starts or [0]) <= self.k:
            return
        heavy, h = keys.state["heavy"], self.heavy
        joined = torch.nn.functional.pad(heavy, (0, 1), value=length - 1 - self.recent)  # ascending
        worth = keys.state["scores"].gather(2, joined.clamp(max=length - 1))
        leaves = h - worth.flip(-1).argmin(-1, keepdim=True)  # of equals the newest
        place = torch.arange(h, device=heavy.device)
        stay = joined.gather(2, place + (place >= leaves).long())
        keys.state["heavy"] = torch.where(self._grown(keys, length), stay, heavy)

    def _kept(self, keys: Keys, length: int) -> tuple[Tensor, list[int]]:
        """What the ``length``-th query reads, tokens [B, Hkv, k], and how many of them count in each row."""
        heavy, device = keys.state["heavy"], keys.kv.device
        recent = torch.arange(length - self.recent, length, device=device).expand(*heavy.shape[:2], -1)
        tokens = torch.cat([heavy, recent], 2)
        counts = [min(self.k, length - first) for first in keys.starts or [0] * heavy.shape[0]]
        for b, count in enumerate(counts):
            if count < self.k:  # nothing has been evicted yet
                tokens[b] = length - count + torch.arange(self.k, device=device) % count
        return tokens, counts

    def _score(self, q: Tensor, keys: Keys, tokens: Tensor, counts: list[int]) -> Tensor:
        """Add what the query q [B, H, 1, D] pays the keys it reads; -> their rows [B, Hkv, k, D]."""
        sums = self._scores(keys, keys.length, q)
        if keys.peers is None:
            rows = keys.kv.gather(tokens).k
            logits = scores(q, rows, keys.softmax)[:, :, :, 0]  # [B, Hkv, G, k]
        else:
            places = torch.nn.functional.pad(keys.places(), (0, 1), value=keys.length)
            here = torch.searchsorted(places, tokens)
            elsewhere = places[here] != tokens
            last = keys.kv.length - 1
            empty = q.new_zeros(*tokens.shape, keys.kv.head_dim)
            rows = keys.kv.gather(here.clamp(max=last)).k if last >= 0 else empty
            logits = scores(q, rows, keys.softmax)[:, :, :, 0]
            logits = keys.peers.sum(logits.masked_fill(elsewhere[:, :, None], 0))
        keys.summary_bytes += rows.numel() * rows.element_size()
        if min(counts) < self.k:
            place = torch.arange(self.k, device=q.device)
            none = place >= torch.tensor(counts, device=q.device)[:, None, None]
            logits = logits.masked_fill(none[:, :, None], -torch.inf)
            tokens = tokens.masked_fill(none, sums.shape[2] - 1)
        share = torch.softmax(logits, -1).sum(2)
        sums.scatter_(2, tokens, sums.gather(2, tokens) + share)
        return rows
