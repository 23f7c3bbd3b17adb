"""The plainest sparse prefill: mean-pooled blocks of queries choose mean-pooled blocks of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..blocks import Grid
from ..budget import check_budget
from ..checks import require
from ..cost import Cost, Queries
from ..gqa import group_scores
from ..keys import Keys
from ..lookahead import Lookahead
from ..method import AttentionMethod
from ..ops.pool import pool
from ..ops.scores import scores
from ..selection import Index
from ..summary import BlockPool, Summary


@dataclass(frozen=True, kw_only=True)
class BlockTopK(AttentionMethod):
    """Each block of queries reads the key blocks with the largest q_mean . k_mean, besides the first and its
    own.

    The selection step that block-sparse prefill methods share in its simplest form (as in 2410.13276, without
    the learned gate). The budget counts tokens per query block, the first and the own block included: at
    least these two are read. ``gqa_reduce`` as in double_sparsity. Decode is dense.
    """

    name: ClassVar[str] = "block_topk"
    title: ClassVar[str] = "Mean-pooled block top-k"
    paper: ClassVar[str] = ""

    k: int | None = 1024
    fraction: float | None = None
    block: int = 64
    gqa_reduce: str = "sum"

    def __post_init__(self) -> None:
        check_budget(self, self.k, self.fraction)
        require(self, block=(1, None), gqa_reduce=("sum", "max", "none"))

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.of_block(self.block)

    @property
    def block_multiple(self) -> int:
        return self.block

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (BlockPool(self.block),)

    def reads(self, queries: Queries) -> Cost:
        if self._covers(queries.length):
            return queries.cost()
        own = (queries.seen - 1) // self.block
        keys = queries.of_blocks(self._size(own), own, own, self.block)
        return queries.cost(keys, selection=queries.entries(*self.summaries))

    def _covers(self, length: int) -> bool:
        return self.k is not None and max(2, self.k // self.block) * self.block >= length

    def _size(self, last: Tensor) -> int | Tensor:
        """Blocks that a query block reads whose last key block is ``last``, as far as there are so many."""
        if self.fraction is None:
            return max(2, (self.k or 0) // self.block)
        return ((last + 1) * self.fraction).round().long().clamp(min=2)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if self._covers(keys.length):
            return None
        grid = Grid.of(keys, self.block, self.block)
        means = keys.summary(*self.summaries)  # [1, Hkv, Nk, D]
        pooled = pool(q, self.block, mode="mean")  # [1, H, Nq, D]
        logits = scores(pooled, means, keys.softmax)  # [1, Hkv, G, Nq, Nk]
        # Only blocks before the own ones are ranked: those are read anyway, and may reach past it.
        ranked = group_scores(logits, (grid.cols < grid.first[:, None])[None], self.gqa_reduce)
        forced = grid.between(grid.first, grid.last) | (grid.cols == 0)
        # A query block off the grid has two own blocks.
        max_blocks = max(3, (self.k or 0) // self.block, round((self.fraction or 0.0) * len(grid.cols)))
        return grid.choose(ranked, forced, self._size(grid.last), max_blocks)
