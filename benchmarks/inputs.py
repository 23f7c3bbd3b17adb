"""Geometry, random inputs and the description of one timed run, for benchmarks.cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farspan.attention.kv import KV
from farspan.attention.packing import Packing
from farspan.attention.quantised import Quantised
from farspan.attention.selection import BlockIndex


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Geometry of a run. batch: rows of the decode side (prefill has one). tokens: a fixed budget of the
    decode side, beside the densities."""

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    block: int
    batch: int
    tokens: int
    densities: tuple[float, ...]
    flex: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def random(self, batch: int, heads: int, length: int) -> Tensor:
        """[B, heads, length, D], normal."""
        return torch.randn(batch, heads, length, self.head_dim, device=self.device, dtype=self.dtype)

    def qkv(self, batch: int, queries: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.random(batch, self.heads, queries),
            self.random(batch, self.kv_heads, length),
            self.random(batch, self.kv_heads, length),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One thing to time.

    at:      the budget it reads ("25 %", "2048 keys"), "" where there is none.
    density: the share of the causal pairs, or of the keys, that it truly reads.
    role:    "ours", "dense" (what sparse runs are compared with), "selection", or "rival".
    memory:  bytes it allocates at its peak, where that is much.
    compiles: its first call takes long for being the first, on the CPU too.
    """

    name: str
    call: Callable[[], Any]
    at: str = ""
    density: float | None = None
    role: str = "ours"
    flops: float = 0
    bytes: float = 0
    memory: float = 0
    compiles: bool = False


def size_of(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def percent(density: float) -> str:
    return f"{100 * density:g} %"


def random_blocks(setting: Setting, length: int, density: float) -> tuple[BlockIndex, int]:
    """First block, own block and random earlier ones per KV head, and the (query, key) pairs of one head that
    they hold: as near to ``density`` of the causal ones as two blocks a row allow."""
    block, nq = setting.block, length // setting.block
    own, square = block * (block + 1) // 2, block * block
    counts, asked, got = [1], density * own, float(own)
    for n in range(1, nq):  # what one row rounds away, the next ones make up for
        asked += density * (n * square + own)
        earlier = min(n, max(1, round((asked - got - own) / square)))
        counts.append(earlier + 1)
        got += earlier * square + own
    most = max(counts)
    count = torch.tensor(counts, device=setting.device)[:, None]
    row = torch.arange(nq, device=setting.device)[:, None]
    col = row.T
    forced = (col == 0) | (col == row)
    heads = []
    for _ in range(setting.kv_heads):
        rank = torch.rand(nq, nq, device=setting.device).masked_fill_(col > row, -1).masked_fill_(forced, 2)
        order = rank.argsort(-1, descending=True)[:, :most]
        kept = torch.where(torch.arange(most, device=setting.device) < count, order, nq)
        heads.append(kept.sort(-1).values.int())
    blocks = torch.stack(heads)[None]  # [1, Hkv, Nq, M], unused entries nq
    number = count[:, 0].int().expand(1, setting.kv_heads, nq).contiguous()
    index = BlockIndex(blocks=blocks, counts=number, block_q=block, block_k=block)
    index.check(length)
    return index, _pairs(index, length)


def _pairs(index: BlockIndex, length: int) -> int:
    """``index.pairs`` of one head, some query blocks at a time: it makes a tensor of all their queries times
    all their blocks."""
    nq, most = index.blocks.shape[2:]
    step = max(1, (1 << 24) // (index.block_q * most))
    total = 0
    for a in range(0, nq, step):
        part = BlockIndex(
            blocks=index.blocks[:, :1, a : a + step],
            counts=index.counts[:, :1, a : a + step],
            block_q=index.block_q,
            block_k=index.block_k,
        )
        rest = length - a * index.block_q  # as if the queries before were of an earlier call
        total += int(part.pairs(rest, length))
    return total


def packed(kv: KV, packing: Packing, outliers: int = 0) -> Quantised:
    """kv with all but 64 positions packed; so many channels of its keys are kept as they are."""
    k, v = kv.dense()
    count = k.shape[2] - 64
    channels = torch.arange(outliers).expand(*k.shape[:2], 1, outliers)
    *made, kept = packing.encode(k[:, :, :count], v[:, :, :count], None, channels)
    return Quantised(*made, k[:, :, count:], v[:, :, count:], kept, channels, packing=packing)
