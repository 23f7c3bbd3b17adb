"""The norm and the gate behind a recurrence."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

ONE = 1.278464542761074  # SiLU of it is 1


class GatedNorm(nn.Module):
    """RMSNorm(y) ⊙ SiLU(G x) (retention, GLA, gated DeltaNet), or RMSNorm(y ⊙ SiLU(G x)) with ``gate_first``
    (Mamba-2).

    The mean square is taken over each of ``groups`` equal parts of the heads; groups = heads normalises each
    head. eps: of the norm. The weight [heads * dim] begins at 1. The papers' gate has no bias; this one has,
    which begins at 0, so that a converted layer can begin without a gate.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        dim: int,
        *,
        eps: float,
        groups: int | None = None,
        gate_first: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.groups = heads, heads if groups is None else groups
        self.eps, self.gate_first = eps, gate_first
        self.gate = nn.Linear(hidden_size, heads * dim)
        nn.init.zeros_(self.gate.bias)
        self.weight = nn.Parameter(torch.ones(heads * dim))

    def begin_as_norm(self, size: Tensor) -> None:
        """Begin with gates of 1 and a norm whose heads have the root mean squares ``size`` [heads]."""
        with torch.no_grad():
            self.gate.weight.zero_()
            self.gate.bias.fill_(ONE)
            self.weight.copy_(size.repeat_interleave(len(self.weight) // self.heads))

    def forward(self, y: Tensor, hidden: Tensor) -> Tensor:
        """y [B, heads, T, dim], hidden [B, T, hidden] -> [B, T, heads * dim] in the dtype of hidden."""
        y = y.transpose(1, 2).flatten(2)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        gate = silu(self.gate(hidden)).to(y.dtype)
        y = (y * gate if self.gate_first else y).unflatten(2, (self.groups, -1))
        y = (y * torch.rsqrt(y.square().mean(3, keepdim=True) + self.eps)).flatten(2) * self.weight.to(
            y.dtype
        )
        return (y if self.gate_first else y * gate).to(hidden.dtype)
