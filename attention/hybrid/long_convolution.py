"""Causal convolutions as long as the sequence, by Fourier transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.autocast import without_autocast


@without_autocast
def long_convolution(x: Tensor, taps: Tensor, count: int) -> Tensor:
    """The last ``count`` of y_t = sum_j taps_j x_(t - j), where x is 0 before its start, in the dtype of x.

    x: [B, S, C]. taps: [L, C], where each channel is multiplied by its own (or [L, C'] with C = 1), or [L, C,
    C'], a matrix for each distance. The product of the transforms is in float32 or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    length = x.shape[1]
    taps = taps[:length].to(wide)
    size = _quick(max(length, count + len(taps) - 1))  # what wraps around meets none of the last
    of_x, of_taps = torch.fft.rfft(x.to(wide), size, dim=1), torch.fft.rfft(taps, size, dim=0)
    product = of_x * of_taps if taps.dim() == 2 else torch.einsum("bfc,fcd->bfd", of_x, of_taps)
    return torch.fft.irfft(product, size, dim=1)[:, length - count : length].to(x.dtype)


def _quick(size: int) -> int:
    """The next multiple of 32: Fourier transforms of sizes with large prime factors are slow."""
    return -(-size // 32) * 32
