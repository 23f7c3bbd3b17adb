"""The definition of ``flash``."""

from __future__ import annotations

from torch import Tensor

from ...causal import causal_mask, positions
from ...kv import KV
from ...partial import Partial
from ...softmax import Softmax
from ..reference import masked_attention


def flash(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int | None,
    start: Tensor | None,
) -> Partial:
    b, tq, tk = q.shape[0], q.shape[2], kv.length
    mask = causal_mask(tq, tk, start, b, q.device)
    if window is not None:
        rows, cols = positions(tq, tk, q.device)
        mask = mask & (cols > rows - window)
    return masked_attention(q, *kv.dense(), mask, scale=softmax.scale, softcap=softmax.softcap)
