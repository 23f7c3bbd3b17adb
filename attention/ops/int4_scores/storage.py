"""Keys in four bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Int4:
    """Keys [B, Hkv, T, D] as their blocks' means plus four bits a number: key = mean + scale * integer.

    packed: [B, Hkv, T, D / 2] uint8. Byte d of a key holds its integers d (low nibble) and D / 2 + d (high
            nibble), -7 .. 7 in two's complement: unpacking gives two halves of a row, nothing to interleave.
    scale:  [B, Hkv, T] float32, per key: the largest |key - mean| over 7.
    mean:   [B, Hkv, ceil(T / block), D], in the type of the keys: what was subtracted, exactly.
    start:  [B], each row's first valid position, or None. Block j of row b begins at start[b] + j * block. In
            the padding scale and packed are 0, and so are the means of blocks past a row's end.

    Everything of a block is a function of the keys in that block and of nothing else. So a store that appends
    keys quantises ``k[:, :, first:]`` anew, ``first`` being where its last block (the one still open) begins,
    and writes packed and scale from position ``first`` and mean from that block on; full blocks never
    change. Against bf16 keys it takes 1/4 + 1/block of the bytes, plus 4 bytes a key.
    """

    packed: Tensor
    scale: Tensor
    mean: Tensor
    block: int
    start: Tensor | None = None

    def integers(self) -> Tensor:
        """[B, Hkv, T, D] int8."""
        return unpack(self.packed)

    def block_of(self) -> Tensor:
        """[B or 1, T] int64: the block each position lies in, 0 in the padding."""
        position = torch.arange(self.scale.shape[2], device=self.scale.device)[None]
        if self.start is not None:
            position = (position - self.start[:, None].to(position.device)).clamp_(min=0)
        return position // self.block

    def dequantise(self) -> Tensor:
        """[B, Hkv, T, D] float32 (float64 where the means are): the keys that the estimates are about; 0 in
        the padding."""
        wide = torch.float64 if self.mean.dtype == torch.float64 else torch.float32
        block = self.block_of()[:, None, :, None].expand(*self.scale.shape, self.mean.shape[3])
        keys = self.mean.to(wide).gather(2, block) + self.integers().to(wide) * self.scale[..., None]
        if self.start is None:
            return keys
        position = torch.arange(keys.shape[2], device=keys.device)
        return keys.masked_fill((position < self.start.to(keys.device)[:, None])[:, None, :, None], 0)


def pack(integers: Tensor) -> Tensor:
    """[..., D] int8 in -8 .. 7 -> [..., D / 2] uint8."""
    low, high = integers.chunk(2, -1)
    return ((low & 15) | (high << 4)).view(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack`."""
    both = packed.view(torch.int8)
    return torch.cat([(both << 4) >> 4, both >> 4], -1)


def round_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Symmetric rounding of x [..., D]: integers -levels .. levels (as floats) and the scale [..., 1], each
    row's largest magnitude over ``levels``. Halves round up; a row of zeros has scale 0."""
    scale = x.abs().amax(-1, keepdim=True) / levels
    return torch.floor(x / torch.where(scale > 0, scale, 1) + 0.5).clamp_(-levels, levels), scale
