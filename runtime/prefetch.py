"""Which rows a decode method will select, by predicted queries."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.keys import Keys
from ..attention.kv import KV
from ..attention.method import DECODE, AttentionMethod
from ..attention.selection import TokenIndex
from ..attention.softmax import Softmax
from ..attention.summary import Summaries


def predictable(method: AttentionMethod) -> bool:
    """Whether what a decode method selects depends on queries, keys and their summaries alone, so that asking
    it with predicted queries changes nothing."""
    stateless = type(method).on_prefill_end is AttentionMethod.on_prefill_end
    return DECODE in method.phases and method.selective and stateless and not method.needs.inputs


def rows_of(
    method: AttentionMethod,
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    starts: list[int] | None,
    summaries: Summaries,
) -> Tensor | None:
    """[B, Hkv, R]: the rows of the stored kv that ``method`` selects for the predicted queries q [B, H, n, D]
    of the next step. The keys of that step do not exist yet, and are on the device when they do. None where
    the method selects no single keys, or where a summary is not up to date."""
    if any(summaries.done(summary) != kv.length for summary in method.summaries) or q.shape[2] > kv.length:
        return None
    start = torch.tensor(starts, device=kv.device) if starts and any(starts) else None
    keys = Keys(kv=kv, tq=q.shape[2], softmax=softmax, start=start, summaries=summaries)
    index = method.select_decode(q, keys)
    if not isinstance(index, TokenIndex) or not index.tokens.shape[3]:
        return None
    return index.tokens.reshape(kv.batch, kv.num_kv_heads, -1)
