"""Leaky integrate-and-fire neurons, whose outputs are 0 or 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .straight_through import straight_through

_SLOPE = 2.0  # of the arc tangent in whose place the step stands in the gradient


def spikes(x: Tensor, potential: Tensor, real: Tensor | None, *, tau: float = 2.0) -> tuple[Tensor, Tensor]:
    """h_t = u_(t-1) + (x_t - u_(t-1)) / tau, s_t = 1 if h_t >= 1 else 0, u_t = h_t (1 - s_t) -> (s [B, T,
    C], the last u [B, C]).

    x: [B, T, C]. potential: u before the first token. real: [B, T] bool, False at padding, which changes no
    u. The gradient of the step is that of atan(pi (h - 1)) / pi. One token is computed after another."""
    fired = []
    for t in range(x.shape[1]):
        h = potential + (x[:, t] - potential) / tau
        s = straight_through((h >= 1).to(h.dtype), torch.atan(math.pi * _SLOPE / 2 * (h - 1)) / math.pi)
        fired.append(s)
        after = h * (1 - s)
        potential = after if real is None else torch.where(real[:, t, None], after, potential)
    return torch.stack(fired, 1), potential
