"""Positive features of queries and keys, so that linear attention has a normaliser."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeatureMap(nn.Module):
    """φ(x) = [softmax(W x), softmax(-W x)] with a W of each head, 2 F numbers (Hedgehog, arXiv 2402.04347, as
    LoLCATs uses it, 2410.10254). weight: [heads, D, F], normal with variance 1 / D."""

    def __init__(self, heads: int, size: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, size, features) * size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, T, D] -> [B, H, T, 2 F]."""
        y = x @ self.weight
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class Softmax(nn.Module):
    """φ(x) = softmax(x), without weights (Liger, arXiv 2503.01496)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)
