"""Quest: pages of keys chosen by an upper bound on their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import budget, budget_at, check_budget, max_budget, select_topk
from ..checks import require
from ..cost import Cost, Queries
from ..gqa import group_scores
from ..keys import Keys
from ..method import AttentionMethod
from ..ops.append import Pages
from ..ops.scores import scores
from ..pages import last_page_tokens, page_tokens
from ..partial import Partial
from ..selection import Index
from ..softmax import Softmax
from ..static_step import EveryKeyStep, StaticKeys, StaticStep, store
from ..summary import BlockPool, Summary
from ..topk_step import TopKStep, covers


@dataclass(frozen=True, kw_only=True)
class Quest(AttentionMethod):
    """Exact attention over the pages whose channel-wise min and max promise the largest logits (Quest,
    2406.10774).

    A page of ``page`` keys keeps min and max per channel; sum over channels of max(q min, q max) bounds every
    logit in it. The best pages within the budget are read whole, the query's own page, still being filled,
    always among them. Layers below ``dense_layers`` stay dense, prefill is dense. ``gqa_reduce``: as in
    double_sparsity.
    """

    name: ClassVar[str] = "quest"
    title: ClassVar[str] = "Quest"
    paper: ClassVar[str] = "2406.10774"

    k: int | None = 512
    fraction: float | None = None
    page: int = 16
    gqa_reduce: str = "max"
    dense_layers: int = 2

    def __post_init__(self) -> None:
        check_budget(self, self.k, self.fraction)
        require(self, page=(1, None), gqa_reduce=("sum", "max", "none"), dense_layers=(0, None))

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (BlockPool(self.page, ("max", "min")),)

    def reads(self, queries: Queries) -> Cost:
        length = queries.length
        size = budget_at(self.k, self.fraction, length)
        if size >= length:
            return queries.cost()
        own = (queries.seen - 1) // self.page
        keys = queries.of_blocks(size // self.page, own, own, self.page)
        return queries.cost(keys, selection=queries.entries(*self.summaries))

    def _pages(self, size: int | Tensor, keys: Keys) -> int | Tensor:
        """Pages per query: whole ones within the budget, all where the budget covers the keys."""
        if isinstance(size, int) and (size % self.page == 0 or (keys.tq == 1 and keys.start is None)):
            return max(1, size // self.page)
        seen = keys.seen()
        whole = max(1, size // self.page) if isinstance(size, int) else (size // self.page).clamp(min=1)
        return torch.where(seen <= size, -(-seen // self.page), whole)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        size = budget(self.k, self.fraction, keys)
        if isinstance(size, int) and size >= keys.longest():
            return None
        pages = self._pages(size, keys)
        bounds = keys.summary(*self.summaries)  # [B, Hkv, P, 2 D]
        # max(q min, q max) per channel is q+ max + q- min, so the bound is one product.
        signed = torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)
        logits = scores(signed, bounds, keys.softmax)
        max_pages = -(-max_budget(self.k, self.fraction, keys) // self.page)
        if keys.tq == 1 and keys.start is None:  # the query's own page is the last one
            logits[..., -1] = -torch.inf
            ranked = group_scores(logits, None, self.gqa_reduce)
            ranked[..., -1] = torch.inf
            chosen, _ = select_topk(ranked, pages, max_pages, every=True)
            return last_page_tokens(chosen, self.page, keys.length)
        first = 0 if keys.start is None else keys.start[:, None, None, None]
        rows = torch.arange(keys.past, keys.length, device=q.device)[:, None]
        own = (rows[None, None] - first) // self.page  # [B or 1, 1, Tq, 1]
        # Only pages before its own are ranked: that one is read anyway and may hold later candidates.
        earlier = torch.arange(logits.shape[-1], device=q.device) < own
        ranked = group_scores(logits, earlier[:, 0], self.gqa_reduce)
        own = own.expand(*ranked.shape[:3], 1)
        chosen, counts = select_topk(ranked.scatter(3, own, torch.inf), pages, max_pages)  # [B, Hs, Tq, M]
        return page_tokens(chosen, counts, self.page, first, rows)

    def static_step(self, keys: StaticKeys) -> StaticStep | None:
        if covers(self.k, self.fraction, keys):
            return EveryKeyStep()
        pages = BlockPool(self.page, ("max", "min"))
        return PagesStep(k=self.k, fraction=self.fraction, pages=pages, reduce=self.gqa_reduce)


@dataclass(frozen=True, kw_only=True)
class PagesStep(TopKStep):
    """The step of ``quest`` where it leaves keys out."""

    name: ClassVar[str] = "pages"

    pages: BlockPool

    @property
    def summary(self) -> Summary:
        return self.pages

    def run(self, q: Tensor, keys: StaticKeys, softmax: Softmax) -> Partial:
        entries, page = keys.entries(self.pages), self.pages.block
        store(keys, pages=Pages(entries, page))
        return self.attend(q, keys, entries, softmax, page=page)

    def read(self, seen: int) -> int:
        page, size = self.pages.block, budget_at(self.k, self.fraction, seen)
        own = (seen - 1) // page
        earlier = own if size >= seen else min(max(1, size // page) - 1, own)
        return earlier * page + seen - own * page
