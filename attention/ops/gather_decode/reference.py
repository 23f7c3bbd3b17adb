"""The definition of ``gather_decode``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ...partial import Partial
from ..reference import masked_attention

if TYPE_CHECKING:
    from ...selection import TokenIndex


def gather_decode(
    q: Tensor, k: Tensor, v: Tensor, index: TokenIndex, *, scale: float, softcap: float | None
) -> Partial:
    index = replace(index, full=None)
    return masked_attention(q, k, v, index.to_mask(q.shape[2], k.shape[2]), scale=scale, softcap=softcap)
