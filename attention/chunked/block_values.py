"""Summaries that are a key and a value: what is attended to in place of a block's own keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..keys import Keys
from ..kv import KV
from ..sources import Source, Sources


@dataclass(frozen=True)
class BlockValues:
    """A summary with one key and one value of each block, side by side: 2 * D numbers.

    scale: the factor of the logits that weigh the values of a block; None: 1 / sqrt(D). Only finished blocks
    are summarised; the entry of an unfinished one is zero, and nothing reads it. most: how many blocks are
    summarised, the first ones of a row; None: all.
    Subclasses have ``name`` and ``of_blocks``.
    """

    block: int
    scale: float | None = None
    most: int | None = None
    name: ClassVar[str]
    dtype: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"keys", "values", "queries"})

    @property
    def key(self) -> tuple:
        return (self.name, self.block, self.scale, self.most)

    def width(self, head_dim: int) -> int:
        return 2 * head_dim

    def compute(self, x: Sources) -> Tensor:
        whole = x.length // self.block * self.block
        blocks = x.cut(0, whole).map(lambda t: t.unflatten(2, (-1, self.block)))
        entries = torch.cat(self.of_blocks(blocks), -1).to(x.keys.dtype)
        unfinished = entries.new_zeros(*entries.shape[:2], int(x.length > whole), entries.shape[3])
        return torch.cat([entries, unfinished], 2)

    def of_blocks(self, x: Sources) -> tuple[Tensor, Tensor]:
        """x, each [B, any, N, block, D] -> keys and values [B, Hkv, N, D]."""
        raise NotImplementedError


class CoreTokens(BlockValues):
    """Both weighed by the attention of the block's last query, the mean over its group's heads (CCA)."""

    name: ClassVar[str] = "core_tokens"

    def of_blocks(self, x: Sources) -> tuple[Tensor, Tensor]:
        weights = attention_of(grouped(x)[..., -1, :].mean(2), x.keys, self.scale)
        return weighted(weights, x.keys), weighted(weights, x.values)


class Spans(BlockValues):
    """The largest number of each channel of the keys, and the values weighed by the attention of the largest
    numbers of the queries, of all positions and heads of the group (Combiner)."""

    name: ClassVar[str] = "spans"

    def of_blocks(self, x: Sources) -> tuple[Tensor, Tensor]:
        weights = attention_of(grouped(x).amax((2, 4)), x.keys, self.scale)
        return x.keys.amax(3), weighted(weights, x.values)


class Means(BlockValues):
    """The mean key and the mean value of the block. Of one token, they are its own."""

    name: ClassVar[str] = "means"
    reads: ClassVar[frozenset[Source]] = frozenset({"keys", "values"})

    def of_blocks(self, x: Sources) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.keys.dtype, torch.float32)
        return x.keys.mean(3, dtype=wide), x.values.mean(3, dtype=wide)


def grouped(x: Sources) -> Tensor:
    """The queries of blocks, by KV head [B, Hkv, G, N, block, D]."""
    return x.queries.unflatten(1, (x.keys.shape[1], -1))


def attention_of(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """softmax(q k^T * scale) in float32, or float64 of float64: q [B, Hkv, N, D], k [B, Hkv, N, block, D]
    -> [B, Hkv, N, block]. scale None: 1 / sqrt(D)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (k.to(wide) @ q.to(wide)[..., None])[..., 0]
    return torch.softmax(logits * (k.shape[-1] ** -0.5 if scale is None else scale), -1)


def weighted(weights: Tensor, x: Tensor) -> Tensor:
    """weights [B, Hkv, N, block], x [B, Hkv, N, block, D] -> their sums over a block [B, Hkv, N, D]."""
    return (weights[..., None, :] @ x.to(weights.dtype))[..., 0, :]


def read_entries(keys: Keys, summary: BlockValues) -> KV:
    """The keys and values [B, Hkv, ceil(Tk / block)] of all blocks."""
    return KV(*keys.entries(summary).split([keys.kv.head_dim, keys.kv.value_dim], 3))
