"""The short convolution in front of a recurrence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .tokens import follow


class ShortConvolution(nn.Module):
    """y_t = SiLU(b + sum_i w_i ⊙ x_(t - W + 1 + i)): causal, and each channel for itself (Mamba-2, arXiv
    2405.21060; gated DeltaNet, 2412.06464). linear: without SiLU.

    Its state is the last W - 1 inputs [B, W - 1, channels], zeros before the first token. weight [channels,
    W], the last column for the token itself, and bias [channels] begin uniform in ±1 / sqrt(W).
    """

    def __init__(self, channels: int, width: int, *, bias: bool, linear: bool = False) -> None:
        super().__init__()
        self.linear = linear
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    @property
    def state_shape(self) -> tuple[int, int]:
        """The shape of one row's state."""
        return self.weight.shape[1] - 1, self.weight.shape[0]

    def pass_through(self) -> None:
        """Begin with y = SiLU(x), or y = x where it is linear."""
        with torch.no_grad():
            self.weight.zero_()[:, -1] = 1
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor, before: Tensor, count: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, channels], real in each row's first count [B] tokens -> (y [B, T, channels], the state
        after them). before: the state before them."""
        inputs, after = follow(before, x, count)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide)
        y = torch.zeros((), dtype=wide, device=x.device) if self.bias is None else self.bias.to(wide)
        for i in range(weight.shape[1]):
            y = torch.addcmul(y, inputs[:, i : i + x.shape[1]].to(wide), weight[:, i])
        return (y if self.linear else silu(y)).to(x.dtype), after

    def of_heads(
        self, parts: Sequence[Tensor], before: Tensor, count: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Parts [B, T, heads, size], whose channels stand side by side in those of the convolution -> (each
        part's y [B, heads, T, size], the state after them). before, count: as in ``forward``."""
        y, after = self(torch.cat([x.flatten(2) for x in parts], 2), before, count)
        ys = y.split([math.prod(x.shape[2:]) for x in parts], 2)
        return [y.unflatten(2, x.shape[2:]).transpose(1, 2) for y, x in zip(ys, parts, strict=True)], after
