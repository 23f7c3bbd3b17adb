"""The gates of SeerAttention: projections of pooled keys and of queries before RoPE, one dot product per
block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from ..errors import FarspanError
from ..gqa import side_by_side
from ..method import LayerInfo
from ..ops.pool import pool
from ..sources import Source, Sources
from ..summary import identity

_EPS = 1e-6  # of the norms, as in the official code


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
        return self.compress_pooled(pool_keys(k, block))

    def compress_pooled(self, pooled: Tensor) -> Tensor:
        """The same of keys [B, Hkv, N, 3 D] that are pooled already (``pool_keys``)."""
        weight = self.k.to(pooled).unflatten(0, (pooled.shape[1], -1))  # [Hkv, S, 3 D, d_g]
        return pooled @ weight.transpose(1, 2).flatten(2)

    def split(self, entries: Tensor) -> Tensor:
        """Compressed keys [B, Hkv, N, S * d_g] -> [B, Hkv, S, N, d_g]."""
        return entries.unflatten(3, (-1, self.size)).transpose(2, 3)

    def logits(
        self, q: Tensor, positions: Tensor, entries: Tensor, block: int, frequencies: Tensor | None
    ) -> Tensor:
        """[B, Hkv, G, n, N], or G = 1 where a group has one score: the products over sqrt(d_g) of queries q
        [B, H, n, D], rotated at ``positions`` (broadcast to [B, Hkv, G, n]), and of compressed keys
        [B, Hkv, N, S * d_g] of blocks of ``block``, rotated where these begin. frequencies: see
        ``rotate``."""
        q, k = self.project(q).unflatten(1, (entries.shape[1], -1)), self.split(entries)
        begins = torch.arange(k.shape[-2], device=k.device) * block
        q, k = rotate(q, positions, frequencies), rotate(k, begins, frequencies)
        return q.to(k) @ k.transpose(-1, -2) * self.size**-0.5

    def project(self, q: Tensor) -> Tensor:
        """Queries q [B, heads, n, D_in] -> [B, heads, n, d_g] in float32 (float64 for float64 queries)."""
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        return q if self.q is None else q @ self.q.to(q)


class GroupGate(BlockGate):
    """The projections of one layer for single queries, one score per KV head. q: [Hkv, G * D, d_g], of the
    queries of a group side by side; k: [Hkv, 3 D, d_g]. q_norm, k_norm: [d_g], the weights of the RMSNorm of
    both."""

    def __init__(self, q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor) -> None:
        super().__init__(q, k, k.shape[0])
        self.q_norm, self.k_norm = nn.Parameter(q_norm), nn.Parameter(k_norm)

    @classmethod
    def start(cls, layer: LayerInfo, size: int) -> Self:
        """The gate that training begins with: the mean of a group's queries and the means of blocks, ``size``
        of their numbers."""
        group, hkv = layer.num_heads // layer.num_kv_heads, layer.num_kv_heads
        q = sampled_channels(layer.head_dim, size).repeat(group, 1).expand(hkv, -1, -1) / group
        k = mean_keys(layer.head_dim, size).expand(hkv, -1, -1).clone()
        return cls(q, k, torch.ones(size), torch.ones(size))

    @classmethod
    def load(cls, layer: LayerInfo, weights: Mapping[str, Tensor]) -> Self:
        """As ``BlockGate.load``."""
        d, size = layer.head_dim, weights["k"].shape[2] // 2 * 2
        hkv, group = layer.num_kv_heads * layer.tp_size, layer.num_heads // layer.num_kv_heads
        check_shape(layer, weights, "q", (hkv, group * d, size))
        check_shape(layer, weights, "k", (hkv, 3 * d, size))
        for name in ("q_norm", "k_norm"):
            check_shape(layer, weights, name, (size,))
        q, k = layer.own(weights["q"]), layer.own(weights["k"])
        return cls(q, k, weights["q_norm"], weights["k_norm"])

    def compress_pooled(self, pooled: Tensor) -> Tensor:
        """As in ``BlockGate``, normalised: [B, Hkv, N, d_g]."""
        entries = super().compress_pooled(pooled)
        return rms_norm(entries, (self.size,), self.k_norm.to(entries), eps=_EPS)

    def project(self, q: Tensor) -> Tensor:
        """Queries q [B, H, n, D] -> [B, Hkv, n, d_g], normalised."""
        projected = super().project(side_by_side(q, self.k.shape[0]))
        return rms_norm(projected, (self.size,), self.q_norm.to(projected), eps=_EPS)


@dataclass(frozen=True)
class CompressedKeys:
    """The summary of a gate: ``gate.compress`` of blocks of ``block`` keys, ``size`` numbers each. gate: None
    only where nothing but the size is asked for."""

    block: int
    size: int
    gate: BlockGate | None = field(default=None, compare=False, repr=False)
    dtype: ClassVar[torch.dtype] = torch.float32
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"keys_before_rope"})

    @property
    def key(self) -> tuple:
        assert self.gate is not None
        return ("gate", self.block, identity(self.gate))

    def width(self, head_dim: int) -> int:
        return self.size

    @torch.no_grad()
    def compute(self, x: Sources) -> Tensor:
        assert self.gate is not None
        return self.gate.compress(x.keys_before_rope, self.block).float()


def pool_keys(k: Tensor, block: int) -> Tensor:
    """concat(max, min, mean) of blocks of keys [B, Hkv, T, D] -> [B, Hkv, ceil(T / block), 3 D] in float32
    (float64 for float64 keys)."""
    pooled = pool(k, block, mode=("max", "min", "mean"))
    return pooled.to(torch.promote_types(pooled.dtype, torch.float32))


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
    # under autocast x may be 16-bit, too coarse for positions
    x = x.to(torch.promote_types(x.dtype, torch.float32))
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
    at = torch.arange(count, dtype=torch.float64, device=frequencies.device) * (most / count)
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
