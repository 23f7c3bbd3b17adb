"""Masked softmax attention, written out: the definition that every attention operation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..partial import Partial


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Partial:
    """Attention of q [B, H, Tq, D] over the pairs that ``mask`` ([B, 1 | Hkv | H, Tq, Tk] bool) allows.

    ``dtype`` is the precision of every step: float32 by default, float64 for float64 inputs and as an oracle.
    The N x N logits exist here, nowhere else.
    """
    wide = dtype or (torch.float64 if q.dtype == torch.float64 else torch.float32)
    h, hkv = q.shape[1], k.shape[1]
    if mask.shape[1] not in (1, h):
        mask = mask.repeat_interleave(h // mask.shape[1], 1)
    key, value = (x.to(wide).repeat_interleave(h // hkv, 1) for x in (k, v))
    logits = q.to(wide) @ key.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0, lse)[..., None])
    # A key that no query may read must not change anything, even if it is NaN (0 * NaN is NaN).
    value = value.masked_fill(~mask.any(2).expand(-1, h, -1)[..., None], 0)
    return Partial((weights @ value).to(q.dtype), lse)
