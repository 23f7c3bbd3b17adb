"""The definition of ``gather_decode``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...index import TokenIndex
from ...partial import Partial
from ..reference import masked_attention


def gather_decode(
    q: Tensor, k: Tensor, v: Tensor, index: TokenIndex, *, scale: float, softcap: float | None
) -> Partial:
    index = replace(index, full=None)
    return masked_attention(q, k, v, index.to_mask(q.shape[2], k.shape[2]), scale=scale, softcap=softcap)
