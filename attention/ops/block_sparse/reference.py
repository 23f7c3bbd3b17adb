"""The definition of ``block_sparse``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...partial import Partial
from ..reference import masked_attention

if TYPE_CHECKING:
    from ...selection import BlockIndex


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, *, scale: float, softcap: float | None
) -> Partial:
    return masked_attention(q, k, v, index.to_mask(q.shape[2], k.shape[2]), scale=scale, softcap=softcap)
