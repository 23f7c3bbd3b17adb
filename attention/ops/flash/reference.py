"""The definition of ``flash``."""

from __future__ import annotations

from torch import Tensor

from ...index import Window, causal_mask
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
    if window is None:
        mask = causal_mask(tq, tk, start, b, q.device)
    else:
        mask = Window(size=window).to_mask(tq, tk, start, b).to(q.device)
    return masked_attention(q, *kv.dense(), mask, scale=softmax.scale, softcap=softmax.softcap)
