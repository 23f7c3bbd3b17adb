"""The definition of ``flash``."""

from __future__ import annotations

from torch import Tensor

from ...causal import causal_mask, positions
from ...partial import Partial
from ..reference import masked_attention


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    start: Tensor | None,
) -> Partial:
    b, tq, tk = q.shape[0], q.shape[2], k.shape[2]
    mask = causal_mask(tq, tk, start, b, q.device)
    if window is not None:
        rows, cols = positions(tq, tk, q.device)
        mask = mask & (cols > rows - window)
    return masked_attention(q, k, v, mask, scale=scale, softcap=softcap)
