"""The definition of ``decode``: masked attention of few queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ...causal import causal_mask, positions
from ...kv import KV
from ...partial import Partial
from ...softmax import Softmax
from ..reference import masked_attention


def decode(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int | None,
    sinks: int,
    start: Tensor | None,
    length: Tensor | None,
) -> Partial:
    kv = kv if length is None else kv[:, :, : int(length)]
    b, tq, tk = q.shape[0], q.shape[2], kv.length
    mask = causal_mask(tq, tk, start, b, q.device)
    if window is not None:
        rows, cols = positions(tq, tk, q.device)
        first = torch.zeros(b, dtype=torch.long, device=q.device) if start is None else start
        early = cols < (first + sinks)[:, None, None]  # [B, 1, Tk]
        mask = mask & ((cols > rows - window) | early)[:, None]
    return masked_attention(q, *kv.dense(), mask, scale=softmax.scale, softcap=softmax.softcap)
