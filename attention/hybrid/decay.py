"""The input-dependent decay of Mamba-2 and of gated DeltaNet."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


class Decay(nn.Module):
    """Δ = softplus(W x + dt_bias) and the log-decay g = -exp(A_log) Δ of each head.

    A = exp(A_log) begins uniform in [lowest, 16], softplus(dt_bias) log-uniform in [0.001, 0.1]. Optimisers
    should not decay A_log and dt_bias.
    """

    def __init__(self, hidden_size: int, heads: int, *, lowest: float) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(lowest, 16).clamp(min=1e-4).log())
        delta = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(delta.expm1().log())  # softplus of it is delta

    def forward(self, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """hidden [B, T, hidden] -> Δ and g [B, heads, T] in ``dtype``."""
        delta = softplus(self.proj(hidden).to(dtype) + self.dt_bias.to(dtype)).transpose(1, 2)
        return delta, -self.A_log.to(dtype).exp()[:, None] * delta
