"""The definition of ``flash``."""

from __future__ import annotations

from torch import Tensor

from ...index import Window, causal_mask
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
    if window is None:
        mask = causal_mask(tq, tk, start, b, q.device)
    else:
        mask = Window(size=window).to_mask(tq, tk, start, b).to(q.device)
    return masked_attention(q, k, v, mask, scale=scale, softcap=softcap)
