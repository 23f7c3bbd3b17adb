"""The definition of ``block_sparse``."""

from __future__ import annotations

from torch import Tensor

from ...kv import KV
from ...lists import BlockLists
from ...partial import Partial
from ...softmax import Softmax
from ..reference import masked_attention


def block_sparse(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> Partial:
    mask = index.to_mask(q.shape[2], kv.length)
    return masked_attention(q, *kv.dense(), mask, scale=softmax.scale, softcap=softmax.softcap)
