"""The plainest sparse prefill: mean-pooled blocks of queries choose mean-pooled blocks of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..index import BlockIndex, Index
from ..keys import Keys
from ..method import PREFILL, AttentionMethod, require
from ..ops.pool import pool
from ..ops.scores import scores
from ..share import check_budget, pick, share_scores
from ..summary import BlockPool, Summary


@dataclass(frozen=True, kw_only=True)
class BlockTopK(AttentionMethod):
    """Each block of queries reads the key blocks with the largest q_mean . k_mean, besides the first and its
    own.

    The selection step that block-sparse prefill methods share in its simplest form (as in 2410.13276, without
    the learned gate). The budget counts tokens per query block, the first and the own block included: at
    least these two are read. ``share`` as in double_sparsity. Decode is dense.
    """

    name: ClassVar[str] = "block_topk"
    title: ClassVar[str] = "Mean-pooled block top-k"
    family: ClassVar[str] = "sparse"
    paper: ClassVar[str] = ""
    phases: ClassVar[frozenset[str]] = frozenset({PREFILL})
    lookahead: ClassVar[str] = "block - 1"

    k: int | None = 1024
    fraction: float | None = None
    block: int = 64
    share: str = "sum"

    def __post_init__(self) -> None:
        check_budget(self, self.k, self.fraction)
        require(self, block=(1, None), share=("sum", "max", "none"))

    @property
    def granule(self) -> int:
        return self.block

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (BlockPool(self.block),)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if self.k is not None and max(2, self.k // self.block) * self.block >= keys.length:
            return None
        means = keys.summary(*self.summaries)  # [1, Hkv, Nk, D]
        pooled = pool(q, self.block, mode="mean")  # [1, H, Nq, D]
        logits = scores(pooled, means, scale=keys.scale)  # [1, Hkv, G, Nq, Nk]
        nq, nk = logits.shape[-2:]
        begins = keys.past + torch.arange(nq, device=q.device) * self.block  # of each query block
        first_own = begins // self.block  # key blocks from here to the last are the query block's own
        last_own = (torch.clamp(begins + self.block, max=keys.length) - 1) // self.block
        cols = torch.arange(nk, device=q.device)
        # Only blocks before the own ones are ranked: those are read anyway, and may reach past it.
        ranked = share_scores(logits, (cols < first_own[:, None])[None], self.share)
        forced = (cols <= last_own[:, None]) & ((cols == 0) | (cols >= first_own[:, None]))  # [Nq, Nk]
        size: int | Tensor = max(2, (self.k or 0) // self.block)
        if self.fraction is not None:
            size = ((last_own + 1) * self.fraction).round().long().clamp(min=2)[None, None]
        # A query block off the grid has two own blocks.
        size = torch.maximum(torch.as_tensor(size, device=q.device), forced.sum(-1)[None, None])
        most_blocks = max(3, (self.k or 0) // self.block, round((self.fraction or 0.0) * nk))
        blocks, counts = pick(ranked.masked_fill(forced, torch.inf), size, most_blocks)
        if counts is None:
            counts = torch.full(blocks.shape[:3], blocks.shape[3], device=q.device)
        return BlockIndex(blocks=blocks.int(), counts=counts.int(), block_q=self.block, block_k=self.block)
