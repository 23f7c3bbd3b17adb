"""DHSA: chunks of keys chosen by pooled chunks of queries, or by the columns and diagonals they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import Grid
from ..budget import check_budget
from ..cost import Cost, Queries
from ..gqa import group_scores, reduce_group
from ..index import Index
from ..keys import Keys, State
from ..method import AttentionMethod, require
from ..ops.pool import pool
from ..ops.scores import scores
from ..ops.select import top_k
from ..received import columns_and_diagonals
from ..summary import BlockPool, Summary


@dataclass(frozen=True, kw_only=True)
class DHSA(AttentionMethod):
    """Dynamic Hierarchical Sparse Attention (2510.24606) over fixed chunks.

    Each chunk of ``block_q`` queries reads the chunks of ``block_k`` keys with the highest scores. Always
    among them are the first chunk, those the queries lie in, and what else holds the last ``local`` keys of
    each. The budget counts tokens per chunk of queries, these included: ``fraction`` of those visible to it
    (the authors' density of 0.125 is of all keys of the prompt, the same for early queries: about twice as
    many pairs), or ``k``. What a chunk of keys scores, by ``select``:

    "mean": a chunk is spoken for by the mean of its queries or keys times the square root of its length, and
    its score is their product. To the paper's tokens, all of a chunk have it, so the best tokens are whole
    chunks.

    "vertical_slash" (the authors' DHSA_vs_optimized, github.com/xiongsiheng/DHSA): the attention of the
    call's last ``block_q`` queries is added up per key (a column) and per distance of query and key (a
    diagonal). As many columns and as many diagonals are kept as half the budget of the last query has tokens.
    A chunk scores the sums of the columns in it and of the diagonals that pass from the queries through it.
    The call's last chunk of queries reads everything. Here all its queries are asked, there 32 or 64 of them,
    and ``local`` keys are always read, there the last chunk alone. A chunk of a prompt is judged by its own
    last queries, so that law 3 does not hold, and raw keys are read.

    gqa_reduce: "none", each head for itself as the authors have it, or one set for a group by the "sum" or
    the "max" of its heads' softmax over chunks, or of their columns and diagonals. Decode is dense.
    """

    name: ClassVar[str] = "dhsa"
    title: ClassVar[str] = "Dynamic Hierarchical Sparse Attention, fixed chunks"
    paper: ClassVar[str] = "2510.24606"
    lookahead: ClassVar[str] = "block_q - 1"  # "prompt" by columns and diagonals

    k: int | None = None
    fraction: float | None = 0.125
    select: str = "mean"
    block_q: int = 128
    block_k: int = 32
    local: int = 64
    gqa_reduce: str = "none"

    def __post_init__(self) -> None:
        check_budget(self, self.k, self.fraction)
        require(self, select=("mean", "vertical_slash"), gqa_reduce=("sum", "max", "none"))
        require(self, block_q=(1, None), block_k=(1, None), local=(1, None))
        if self.select == "vertical_slash":
            object.__setattr__(self, "lookahead", "prompt")
            object.__setattr__(self, "reads_keys", True)

    @property
    def block_multiple(self) -> int:
        return math.lcm(self.block_q, self.block_k)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (BlockPool(self.block_k, ("length_normalised",)),) if self.select == "mean" else ()

    @property
    def last_queries(self) -> int:
        return 0 if self.select == "mean" else self.block_q

    def reads(self, queries: Queries) -> Cost:
        length = queries.length
        if self._covers(length):
            return queries.cost()
        begin = (queries.seen - 1) // self.block_q * self.block_q
        end = (begin + self.block_q).clamp(max=length)
        first = (begin - (self.local - 1)).clamp(min=0) // self.block_k
        last = (end - 1) // self.block_k
        size = torch.maximum(torch.as_tensor(self._size(last)), last - first + 1 + (first > 0))
        keys = queries.of_blocks(size, first, last, self.block_k)
        if self.select == "mean":
            return queries.cost(keys, selection=queries.entries(*self.summaries))
        keys = torch.where(end == length, queries.seen, keys)
        return queries.cost(keys, selection=queries.raw_keys(length))

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if self._covers(keys.length) or (self.last_queries and not keys.prepared):
            return None
        grid = Grid.of(keys, self.block_q, self.block_k)
        local = grid.local(self.local)
        forced = grid.between(local, grid.last) | (grid.cols == 0)
        # Chunks are ranked that end before all of these queries; the others are read anyway.
        before = grid.cols < local[:, None]
        if self.select == "mean":
            ranked = self._products(q, keys, before)
        else:
            ranked = self._masses(keys, grid).masked_fill(~before, -torch.inf)
            ends = grid.end == keys.prepared["columns"].shape[2]  # the call
            forced |= ends[:, None] & (grid.cols <= grid.last[:, None])
        most = None
        if self.select == "mean":
            always = (self.block_q + self.local - 2) // self.block_k + 3
            most = max(always, self._least, round(len(grid.cols) * (self.fraction or 0.0)))
        return grid.choose(ranked, forced, self._size(grid.last), most)

    @property
    def _least(self) -> int:
        """Chunks of keys that every chunk of queries reads, where there are so many."""
        return max(2, (self.k or 0) // self.block_k)

    def _size(self, last: Tensor) -> int | Tensor:
        """Chunks of keys that a chunk of queries reads whose last one is ``last``, if no more are always
        read."""
        return self._least if self.fraction is None else ((last + 1) * self.fraction).round().long()

    def _covers(self, length: int) -> bool:
        return self.fraction == 1 or self._least * self.block_k >= length

    def _products(self, q: Tensor, keys: Keys, visible: Tensor) -> Tensor:
        """[1, Hs, Nq, Nk]"""
        chunks = keys.summary(*self.summaries)  # [1, Hkv, Nk, D]
        queries = pool(q, self.block_q, mode="length_normalised")  # [1, H, Nq, D]
        # For whole chunks the square roots go, and what is left is a mean logit.
        logits = scores(
            queries,
            chunks,
            replace(keys.softmax, scale=keys.softmax.scale / math.sqrt(self.block_q * self.block_k)),
        )
        return group_scores(logits, visible[None], self.gqa_reduce)

    def prepare_prefill(self, q: Tensor, keys: Keys) -> State:
        """columns [1, Hs, T], diagonals [1, Hs, T] by distance: the attention that those kept have received
        of queries q [1, H, n, D], 0 at the others. Nothing where every key is read."""
        length = keys.length
        if self._covers(length):
            return {}
        columns, diagonals = columns_and_diagonals(q, keys)
        tokens = self.k or round(length * (self.fraction or 0.0))
        kept = {"columns": (columns, tokens // 2), "diagonals": (diagonals, tokens - tokens // 2)}
        return {name: self._kept(received, size) for name, (received, size) in kept.items()}

    def _kept(self, x: Tensor, size: int) -> Tensor:
        """The ``size`` highest of x [1, Hkv, G, T], at least one: [1, Hs, T], 0 at the others."""
        x = reduce_group(x, self.gqa_reduce)
        chosen = top_k(x, max(1, size))
        return torch.zeros_like(x).scatter(2, chosen, x.gather(2, chosen))

    def _masses(self, keys: Keys, grid: Grid) -> Tensor:
        """[1, Hs, Nq, Nk]: what the kept columns in a chunk of keys hold, and the kept diagonals that pass
        from some query of a chunk through it."""
        columns, diagonals = keys.prepared["columns"][..., : keys.length], keys.prepared["diagonals"]
        columns = pad(columns, (0, -keys.length % self.block_k)).unflatten(2, (-1, self.block_k)).sum(3)
        nearer = pad(diagonals.double().cumsum(2), (1, 0))  # small shares are differences of large sums
        first = grid.cols * self.block_k
        upto = (grid.end[:, None] - first).clamp(min=0)  # after the furthest of their distances
        since = (grid.begin[:, None] - first - (self.block_k - 1)).clamp(min=0)
        passing = nearer[..., upto] - nearer[..., since]  # [1, Hs, Nq, Nk]
        return passing.to(columns.dtype) + columns[:, :, None]
