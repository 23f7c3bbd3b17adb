"""DHSA: chunks of keys chosen by pooled chunks of queries, or by the columns and diagonals they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import Grid
from ..cost import Cost, Queries
from ..diagonals import block_sums, columns_and_diagonals, keep_highest
from ..gqa import group_scores, reduce_group
from ..keys import Keys, State
from ..lookahead import Lookahead
from ..needs import Needs
from ..ops.pool import pool
from ..ops.scores import scores
from ..selection import Index
from ..summary import BlockPool, Summary
from .dhsa_learned import LearnedChunks


@dataclass(frozen=True, kw_only=True)
class DHSA(LearnedChunks):
    """Dynamic Hierarchical Sparse Attention (2510.24606) over fixed chunks.

    Each chunk of ``block_q`` queries reads the chunks of ``block_k`` keys with the highest scores. The first
    chunk, the chunks that the queries lie in and those with the last ``local`` keys of a query are always
    read. The budget counts tokens per chunk of queries, these included: ``fraction`` of the keys visible to
    it (the authors' density of 0.125 is of all keys of the prompt, for early queries too, about twice as many
    pairs), or ``k``. The score of a chunk of keys depends on ``select``:

    "mean": a chunk is the mean of its queries or keys times the square root of its length, and the score is
    the product of two. In the paper all tokens of a chunk have its score: the best tokens are whole chunks.

    "vertical_slash" (the authors' DHSA_vs_optimized, github.com/xiongsiheng/DHSA): the attention of the
    call's last ``block_q`` queries is summed per key (a column) and per distance of query and key (a
    diagonal). The highest columns and the highest diagonals are kept, half the budget of the last query each.
    The score of a chunk is the sum of its columns and of the diagonals that pass from the queries through it.
    The call's last chunk of queries reads everything. The authors' code sums over 32 or 64 queries of that
    chunk and always reads the last chunk alone. Law 3 does not hold: a chunk of a prompt has its own queries.

    gqa_reduce: "none", each head selects alone as in the authors' code, or one selection for a group by the
    "sum" or the "max" of its heads' softmax over chunks, or of their columns and diagonals. Decode is dense.

    boundaries="learned" (the paper's first version; needs a recipe of ``farspan train``): chunks of keys of
    any length. A predictor scores each position by the 4 keys on both sides of it. The best positions, more
    than ``apart`` from each other, begin chunks. The tokens of the chunks that rank highest are read, the
    last one in part, besides the first ``block_k`` tokens and the last ``local``; the budget counts tokens.
    Departures: in every ``segment`` of keys alone, at most segment / block_k chunks, so that they depend on
    no later segment; chunks of queries are fixed; the labels and the loss of ``boundary_loss``. Single tokens
    are listed, in T^2 / block_q * fraction numbers a head: give long prompts ``prefill_chunk``.
    """

    name: ClassVar[str] = "dhsa"
    title: ClassVar[str] = "Dynamic Hierarchical Sparse Attention"
    paper: ClassVar[str] = "2510.24606"

    @property
    def lookahead(self) -> Lookahead:
        ahead = max(self.block_q, self.segment if self.trains else 1)
        return Lookahead.of_block(ahead) if self.select == "mean" else Lookahead.prompt()

    @property
    def needs(self) -> Needs:
        return self._learned_needs if self.trains else Needs(keys=self.select == "vertical_slash")

    @property
    def block_multiple(self) -> int:
        return math.lcm(self.block_q, self.segment if self.trains else self.block_k)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        pooled = self.select == "mean" and not self.trains
        return (BlockPool(self.block_k, ("length_normalised",)),) if pooled else ()

    @property
    def last_queries(self) -> int:
        return 0 if self.select == "mean" else self.block_q

    def reads(self, queries: Queries) -> Cost:
        if self.trains:
            return self._learned_reads(queries)
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
        if self.trains:
            return self._select_learned(q, keys)
        if self._covers(keys.length) or (self.last_queries and not keys.prepared):
            return None
        grid = Grid.of(keys, self.block_q, self.block_k)
        local = grid.local(self.local)
        forced = grid.between(local, grid.last) | (grid.cols == 0)
        # Chunks are ranked that end before all of these queries; the others are read anyway.
        before = grid.cols < local[:, None]
        if self.select == "mean":
            chunks = keys.summary(*self.summaries)  # [1, Hkv, Nk, D]
            queries = pool(q, self.block_q, mode="length_normalised")  # [1, H, Nq, D]
            # of whole chunks, a mean logit
            scale = keys.softmax.scale / math.sqrt(self.block_q * self.block_k)
            logits = scores(queries, chunks, replace(keys.softmax, scale=scale))
            ranked = group_scores(logits, before[None], self.gqa_reduce)
            always = (self.block_q + self.local - 2) // self.block_k + 3
            max_blocks = max(always, self._least, round(len(grid.cols) * (self.fraction or 0.0)))
        else:
            columns, diagonals = keys.prepared["columns"], keys.prepared["diagonals"]
            ranked = block_sums(columns[..., : keys.length], diagonals, grid)
            ranked = ranked.masked_fill(~before, -torch.inf)
            ends = grid.end == columns.shape[2]  # the call
            forced |= ends[:, None] & (grid.cols <= grid.last[:, None])
            max_blocks = None
        return grid.choose(ranked, forced, self._size(grid.last), max_blocks)

    @property
    def _least(self) -> int:
        """Chunks of keys that every chunk of queries reads, where there are so many."""
        return max(2, (self.k or 0) // self.block_k)

    def _size(self, last: Tensor) -> int | Tensor:
        """Chunks of keys within the budget of a chunk of queries whose last chunk of keys is ``last``."""
        return self._least if self.fraction is None else ((last + 1) * self.fraction).round().long()

    def _covers(self, length: int) -> bool:
        return self.fraction == 1 or self._least * self.block_k >= length

    def prepare_prefill(self, q: Tensor, keys: Keys) -> State:
        """columns [1, Hs, T], diagonals [1, Hs, T] by distance: the attention that the kept ones received
        from queries q [1, H, n, D], 0 at the others. Nothing where every key is read."""
        if self._covers(keys.length):
            return {}
        columns, diagonals = (reduce_group(x, self.gqa_reduce) for x in columns_and_diagonals(q, keys))
        tokens = self.k or round(keys.length * (self.fraction or 0.0))
        kept = keep_highest(columns, tokens // 2), keep_highest(diagonals, tokens - tokens // 2)
        return {"columns": kept[0], "diagonals": kept[1]}
