"""The gates of SeerAttention: projections of pooled keys and of queries before RoPE, one dot product per
block."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import FarspanError
from ..method import LayerInfo
from ..ops.pool import pool

_MADE = itertools.count()


class BlockGate(nn.Module):
    """The projections of one layer.

    q: [heads, D_in, d_g], or None for queries that are used as they are. k: [S * Hkv, 3 D, d_g], the
    projections of each KV head's pooled keys, concat(max, min, mean). S is 1, or the size of a group where
    every query head has its own.
    """

    def __init__(self, q: Tensor | None, k: Tensor, num_kv_heads: int) -> None:
        super().__init__()
        self.q = None if q is None else nn.Parameter(q)
        self.k = nn.Parameter(k)
        self.size = k.shape[2]  # d_g, the numbers of a projected vector
        self.entry = k.shape[0] // num_kv_heads * self.size  # numbers of a KV head's compressed key
        self.number = next(_MADE)  # tells its compressed keys from those of other gates

    @classmethod
    def start(cls, layer: LayerInfo, size: int) -> Self:
        """The gate that training begins with: the dot product of mean-pooled queries and keys, of ``size`` of
        their numbers."""
        q = sampled_channels(layer.head_dim, size).expand(layer.num_heads, -1, -1).clone()
        k = mean_keys(layer.head_dim, size).expand(layer.num_kv_heads, -1, -1).clone()
        return cls(q, k, layer.num_kv_heads)

    @classmethod
    def load(cls, layer: LayerInfo, weights: Mapping[str, Tensor]) -> Self:
        """The gate of a recipe's tensors for a layer; this rank's heads under tensor parallelism. Raises
        FarspanError for sizes that do not fit the layer."""
        h, hkv, d = layer.num_heads * layer.tp_size, layer.num_kv_heads * layer.tp_size, layer.head_dim
        size, q = weights["k"].shape[2] // 2 * 2, weights.get("q")
        check_shape(layer, weights, "k", (h, 3 * d, d) if q is None else (hkv, 3 * d, size))
        if q is not None:
            check_shape(layer, weights, "q", (h, d, size))
            q = layer.own(q)
        return cls(q, layer.own(weights["k"]), layer.num_kv_heads)

    def compress(self, k: Tensor, block: int) -> Tensor:
        """Keys before RoPE k [B, Hkv, T, D] -> [B, Hkv, ceil(T / block), S * d_g] in float32 (float64 for
        float64 keys), before RoPE too."""
        pooled = pool(k, block, mode=("max", "min", "mean"))
        wide = _wide(pooled)
        weight = self.k.to(wide).unflatten(0, (k.shape[1], -1))  # [Hkv, S, 3 D, d_g]
        return pooled.to(wide) @ weight.transpose(1, 2).flatten(2)

    def split(self, entries: Tensor) -> Tensor:
        """Compressed keys [B, Hkv, N, S * d_g] -> [B, Hkv, S, N, d_g]."""
        return entries.unflatten(3, (-1, self.size)).transpose(2, 3)

    def project(self, q: Tensor) -> Tensor:
        """Queries q [B, heads, n, D_in] -> [B, heads, n, d_g] in float32 (float64 for float64 queries)."""
        q = q.to(_wide(q))
        return q if self.q is None else q @ self.q.to(q)


@dataclass(frozen=True)
class CompressedKeys:
    """The summary of a gate: ``gate.compress`` of blocks of ``block`` keys, ``size`` numbers each. gate: None
    only where nothing but the size is asked for."""

    block: int
    size: int
    gate: BlockGate | None = field(default=None, compare=False, repr=False)
    dtype: ClassVar[torch.dtype] = torch.float32
    before_rope: ClassVar[bool] = True

    @property
    def key(self) -> tuple:
        return ("gate", self.block, None if self.gate is None else self.gate.number)

    def width(self, head_dim: int) -> int:
        return self.size

    @torch.no_grad()
    def compute(self, k: Tensor) -> Tensor:
        assert self.gate is not None
        return self.gate.compress(k, self.block)


def pool_queries(q: Tensor, block: int, lead: int) -> Tensor:
    """Queries q [B, H, T, D] averaged over blocks, the first of which began ``lead`` queries before them."""
    first = pool(q[:, :, : block - lead], block, mode="mean")
    return torch.cat([first, pool(q[:, :, block - lead :], block, mode="mean")], 2)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor | None) -> Tensor:
    """RoPE of x [..., n, d] at positions [..., n]: number i and number d / 2 + i are a pair. frequencies: the
    layer's own (``Inputs.frequencies``), of which d / 2 are sampled; None: no rotation.

    Only the differences of positions matter, so they may be counted from the row's first token.
    """
    if frequencies is None:
        return x
    turn = positions[..., None].to(x) * sample_frequencies(frequencies, x.shape[-1] // 2).to(x)
    cos, sin = turn.cos(), turn.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def sample_frequencies(frequencies: Tensor, count: int) -> Tensor:
    """``count`` frequencies out of frequencies [R], descending: entry i is the one at i * R / count,
    interpolated in the logarithm. For theta^(-i / R) this is theta^(-i / count)."""
    most = frequencies.shape[0]
    if most == count:
        return frequencies
    at = torch.arange(count, device=frequencies.device) * (most / count)
    low = at.floor().clamp(max=max(most - 2, 0)).long()
    logs = frequencies.double().clamp(min=1e-30).log()
    step = logs[(low + 1).clamp(max=most - 1)] - logs[low]
    return (logs[low] + (at - low) * step).exp()


def sampled_channels(head_dim: int, size: int) -> Tensor:
    """[D, d_g]: the projection that keeps d_g of D numbers, in pairs of RoPE, those whose frequencies
    ``sample_frequencies`` picks; scaled so that a dot product over sqrt(d_g) is about that of whole vectors
    over sqrt(D)."""
    pairs = torch.arange(size // 2) * head_dim // size  # of the D / 2 pairs (i, D / 2 + i)
    kept = torch.cat([pairs, pairs + head_dim // 2])
    chosen = torch.zeros(head_dim, size)
    chosen[kept, torch.arange(size)] = (head_dim / size) ** 0.25
    return chosen


def mean_keys(head_dim: int, size: int) -> Tensor:
    """[3 D, d_g]: ``sampled_channels`` of the mean in concat(max, min, mean)."""
    channels = sampled_channels(head_dim, size)
    return torch.cat([torch.zeros(2 * head_dim, size), channels])


def check_shape(layer: LayerInfo, weights: Mapping[str, Tensor], name: str, wanted: tuple[int, ...]) -> None:
    """Raise FarspanError unless the recipe's tensor ``name`` has the shape ``wanted``."""
    given = tuple(weights[name].shape)
    if given != wanted:
        raise FarspanError(
            f"This recipe has {name} of the sizes {list(given)} in layer {layer.index}, the model needs "
            f"{list(wanted)}: it was made for another model."
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
