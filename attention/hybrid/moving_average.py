"""Exponential moving averages of channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .long_convolution import long_convolution


def moving_average(x: Tensor, before: Tensor, keep: Tensor) -> Tensor:
    """y_t = keep y_(t-1) + (1 - keep) x_t: x [B, T, C], before [B, C], keep [C] -> [B, T, C]."""
    powers = keep ** torch.arange(x.shape[1] + 1, device=x.device)[:, None]
    return long_convolution(x, powers[:-1] * (1 - keep), x.shape[1]) + powers[1:] * before[:, None]
