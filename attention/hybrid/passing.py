"""What a shard of a sequence does to the state of ``scan``: a linear map, and an own state that is added."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.scan import scan


def scan_transition(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    beta: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(change, own) of a shard, for :func:`scan_advance`. k, v, log_decay, beta, mask: as ``scan`` gets them.

    own [B, H, Dk, Dv]: the state after the shard where the state before it is zero. change: the total decay
    [B, H, 1, 1], or [B, H, Dk, 1] for a decay per channel; with beta the matrix [B, H, Dk, Dk]. Both are in
    float32, or in float64 for float64 inputs.
    """
    b, h, t, dv = v.shape
    dk = k.shape[3]
    wide = torch.promote_types(v.dtype, torch.float32)
    if beta is not None:  # columns of v that are zero, from the identity, give the matrix in the same scan
        v = torch.cat([v, v.new_zeros(b, h, t, dk)], 3)
        own = torch.zeros(dk, dv, dtype=wide, device=v.device)
        state = torch.cat([own, torch.eye(dk, dtype=wide, device=v.device)], 1).expand(b, h, dk, dv + dk)
        end = scan(k, k, v, log_decay, beta=beta, state=state, mask=mask)[1]
        return end[..., dv:], end[..., :dv]
    own = scan(k, k, v, log_decay, mask=mask)[1]
    if log_decay is None:
        return own.new_ones(b, h, 1, 1), own
    decay = log_decay.to(wide)
    if mask is not None:
        real = mask[:, None, :, None] if decay.dim() == 4 else mask[:, None]
        decay = decay.masked_fill(~real, 0)
    return decay.sum(2).exp().view(b, h, -1, 1), own


def scan_advance(state: Tensor, change: Tensor, own: Tensor) -> Tensor:
    """The state [B, H, Dk, Dv] after a shard. change, own: its ``scan_transition``."""
    state = state.to(own.dtype)
    return (change * state if change.shape[3] == 1 else change @ state) + own
