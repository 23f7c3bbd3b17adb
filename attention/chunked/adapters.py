"""ChunkLLM's adapters of one layer, and what is kept of every token by them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..gqa import side_by_side
from ..method import LayerInfo
from ..sources import Source, Sources
from ..summary import identity


class Adapters(nn.Module):
    """q [Hkv, dim, G * D] compresses the queries of a group to one of ``dim`` numbers, k [Hkv, dim, D] the
    keys; ``boundary`` is one linear layer from a hidden state to the logit of a chunk boundary.

    At first q and k are the same random projection, of the mean query and of the keys, so that products of
    compressed vectors estimate the mean logit of the group. ``boundary`` begins alike in every layer, so that
    layers which learn from the same hidden states have the same boundaries.
    """

    def __init__(self, layer: LayerInfo, dim: int, hidden_size: int) -> None:
        super().__init__()
        group = layer.num_heads // layer.num_kv_heads
        projection = torch.randn(layer.num_kv_heads, dim, layer.head_dim) * dim**-0.5
        self.q = nn.Parameter(projection.repeat(1, 1, group) / group)
        self.k = nn.Parameter(projection.clone())
        self.boundary = nn.Linear(hidden_size, 1)
        with torch.no_grad():
            made = torch.Generator().manual_seed(0)
            self.boundary.weight.copy_(torch.randn(1, hidden_size, generator=made) * hidden_size**-0.5)
            self.boundary.bias.zero_()

    def queries(self, q: Tensor) -> Tensor:
        """q [B, H, T, D] -> [B, Hkv, T, dim], in float32 (float64 for float64 q)."""
        return _times(side_by_side(q, self.k.shape[0]), self.q)

    def keys(self, k: Tensor) -> Tensor:
        """k [B, Hkv, T, D] -> [B, Hkv, T, dim], in float32 (float64 for float64 k)."""
        return _times(k, self.k)

    def boundary_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, hidden] of the early layer -> [B, T]."""
        wide = torch.promote_types(hidden.dtype, self.boundary.weight.dtype)
        weight, bias = self.boundary.weight.to(wide), self.boundary.bias.to(wide)
        return (hidden.to(wide) @ weight[0]) + bias


def _times(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, weight.dtype)
    return x.to(wide) @ weight.to(wide).transpose(1, 2)


@dataclass(frozen=True)
class CompressedKeys:
    """The compressed key of every token: a label of ``dim`` numbers in the type of the keys."""

    adapters: Adapters = field(compare=False)
    block: ClassVar[None] = None
    dtype: ClassVar[None] = None
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"keys"})

    @property
    def key(self) -> tuple:
        return ("compressed", identity(self.adapters))

    def width(self, head_dim: int) -> int:
        return self.adapters.k.shape[1]

    @torch.no_grad()
    def compute(self, x: Sources) -> Tensor:
        return self.adapters.keys(x.keys).to(x.keys.dtype)


@dataclass(frozen=True)
class ChunkEnds:
    """Whether a token ends a chunk, of every token: a label of 0 or 1, one for all KV heads. alpha: the
    probability above which it does."""

    adapters: Adapters = field(compare=False)
    alpha: float
    block: ClassVar[None] = None
    dtype: ClassVar[torch.dtype] = torch.uint8
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"early_hidden_states"})

    @property
    def key(self) -> tuple:
        return ("chunk ends", identity(self.adapters), self.alpha)

    def width(self, head_dim: int) -> int:
        return 1

    def of(self, hidden: Tensor) -> Tensor:
        """[B, T] bool for hidden states [B, T, hidden]."""
        return self.adapters.boundary_logits(hidden).sigmoid() > self.alpha

    @torch.no_grad()
    def compute(self, x: Sources) -> Tensor:
        return self.of(x.early_hidden_states)[:, None, :, None].byte()
