"""The definition of ``gather_decode``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ...kv import KV
from ...lists import TokenLists
from ...partial import Partial
from ...softmax import Softmax
from ..reference import masked_attention


def gather_decode(q: Tensor, kv: KV, index: TokenLists, softmax: Softmax) -> Partial:
    index = replace(index, full=None)
    mask = index.to_mask(q.shape[2], kv.length)
    return masked_attention(q, *kv.dense(), mask, scale=softmax.scale, softcap=softmax.softcap)
