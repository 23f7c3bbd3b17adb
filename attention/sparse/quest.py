"""Quest: pages of keys chosen by an upper bound on their logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budget import budget, budget_at, check_budget, max_budget
from ..checks import require
from ..cost import Cost, Queries
from ..keys import Keys
from ..method import AttentionMethod
from ..ops.append import Pages
from ..pages import best_pages, page_bounds
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

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        size = budget(self.k, self.fraction, keys)
        if isinstance(size, int) and size >= keys.longest():
            return None
        bounds = page_bounds(q, keys.summary(*self.summaries), keys.softmax)
        most = max_budget(self.k, self.fraction, keys)
        return best_pages(
            bounds, size, most, self.page, self.gqa_reduce, length=keys.length, start=keys.start
        )

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
