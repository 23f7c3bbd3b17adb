"""Quantised keys and values for tests, and the definition of their rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.attention.packing import Int4, Int8, Packing
from farspan.attention.quantised import Quantised

PACKINGS = {"int8": Int8(group=16, window=0), "int4": Int4(group=32, window=0)}


def quantised(
    packing: Packing, k: Tensor, v: Tensor, packed: int, *, outliers: int = 0, valid: Tensor | None = None
) -> Quantised:
    """Of k and v, of which the first ``packed`` positions are rounded; the channels that are kept are the
    last ones."""
    channels = torch.arange(k.shape[3] - outliers, k.shape[3]).expand(*k.shape[:2], 1, outliers)
    *made, kept = packing.encode(k[:, :, :packed], v[:, :, :packed], valid, channels)
    return Quantised(*made, k[:, :, packed:], v[:, :, packed:], kept, channels, packing=packing)


def rounded(x: Tensor, bits: int) -> Tensor:
    """The numbers x [N] of one group after rounding, in float64, written out."""
    low, high = x.min().double(), x.max().double()
    levels = 2**bits - 1
    eps = torch.finfo(x.dtype).eps
    scale = ((high - low) / levels * (1 + eps if levels * eps > 1 else 1)).to(x.dtype).double()
    codes = torch.zeros(len(x), dtype=torch.float64)
    if scale > 0:
        codes = torch.floor((x.double() - low) / scale + 0.5).clamp(0, levels)
    return low + scale * codes
