"""Keys in four bits as a summary of blocks, by which SALE estimates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kv import KV
from ..ops.int4_scores import Int4, quantise_int4
from ..sources import Source, Sources


@dataclass(frozen=True)
class Int4Keys:
    """Keys in four bits around the mean of their block (``ops.int4_scores``): a block's means and its keys'
    scales in float32, then their bits, side by side as bytes."""

    block: int
    dtype: ClassVar[torch.dtype] = torch.uint8
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"keys"})

    @property
    def key(self) -> tuple:
        return ("int4", self.block)

    def width(self, head_dim: int) -> int:
        return 4 * (head_dim + self.block) + -(-self.block * head_dim // 8) * 4

    def compute(self, x: Sources) -> Tensor:
        k = x.keys
        k4 = quantise_int4(k.float() if k.dtype == torch.float64 else k, self.block)
        fill = -k.shape[2] % self.block
        scale = pad(k4.scale, (0, fill)).unflatten(2, (-1, self.block))
        packed = pad(k4.packed, (0, 0, 0, fill)).unflatten(2, (-1, self.block)).flatten(3)
        packed = pad(packed, (0, -packed.shape[3] % 4))
        return torch.cat([k4.mean.float().view(torch.uint8), scale.view(torch.uint8), packed], 3)

    def keys(self, entries: Tensor, like: KV) -> Int4:
        """Those of the keys of ``like`` [B, Hkv, T] out of their entries."""
        t, d = like.length, like.head_dim
        mean, scale, packed = entries.split(
            [4 * d, 4 * self.block, entries.shape[3] - 4 * (d + self.block)], 3
        )
        packed = packed[..., : self.block * d // 2].unflatten(3, (self.block, d // 2))
        return Int4(
            packed=packed.flatten(2, 3)[:, :, :t],
            scale=scale.view(torch.float32).flatten(2)[:, :, :t],
            mean=mean.view(torch.float32).to(like.dtype),
            block=self.block,
        )
