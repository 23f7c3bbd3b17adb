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
    are summarised; the entry of an unfinished one is zero, and nothing reads it.
    Subclasses have ``name`` and ``of_blocks``.
    """

    block: int
    scale: float | None = None
    name: ClassVar[str]
    dtype: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"keys", "values", "queries"})

    @property
    def key(self) -> tuple:
        return (self.name, self.block, self.scale)

    def width(self, head_dim: int) -> int:
        return 2 * head_dim

    def compute(self, x: Sources) -> Tensor:
        whole = x.keys.shape[2] // self.block * self.block
        q, k, v = (t[:, :, :whole].unflatten(2, (-1, self.block)) for t in (x.queries, x.keys, x.values))
        k, v = self.of_blocks(q.unflatten(1, (k.shape[1], -1)), k, v)
        entries = torch.cat([k, v], -1).to(x.keys.dtype)
        unfinished = entries.new_zeros(*x.keys.shape[:2], int(x.keys.shape[2] > whole), entries.shape[3])
        return torch.cat([entries, unfinished], 2)

    def of_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, Hkv, G, N, block, D], k and v [B, Hkv, N, block, D] -> keys and values [B, Hkv, N, D]."""
        raise NotImplementedError


class CoreTokens(BlockValues):
    """Both weighed by the attention of the block's last query, the mean over its group's heads (CCA)."""

    name: ClassVar[str] = "core_tokens"

    def of_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = attention_of(q[..., -1, :].mean(2), k, self.scale)
        return weighted(weights, k), weighted(weights, v)


class Spans(BlockValues):
    """The largest number of each channel of the keys, and the values weighed by the attention of the largest
    numbers of the queries, of all positions and heads of the group (Combiner)."""

    name: ClassVar[str] = "spans"

    def of_blocks(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.amax(3), weighted(attention_of(q.amax((2, 4)), k, self.scale), v)


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
