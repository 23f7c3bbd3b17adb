"""``gather_decode``: one flat row gather per tensor, then the library's attention over the gathered rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv import KV
from ...lists import TokenLists
from ...partial import Partial, empty_partial
from ...softmax import Softmax
from .. import kernel


def gather_decode(q: Tensor, kv: KV, index: TokenLists, softmax: Softmax) -> Partial:
    b, h, tq, d = q.shape
    hkv = kv.num_kv_heads
    hs, n = index.tokens.shape[1], index.tokens.shape[3]
    if n == 0:
        return empty_partial(q, kv.value_dim)
    rows_read = index.gathered
    if rows_read is None:
        # [B, Hs, Tq, K] -> rows per KV head, in the order (heads of the group, queries, K)
        rows_read = kv.gather(index.tokens.reshape(b, hkv, -1))
    mask = None
    if index.counts is not None:
        mask = torch.arange(n, device=q.device) < index.counts[..., None]  # [B, Hs, Tq, K]
    if hs == hkv:
        rows = q.reshape(b, hkv, h // hkv, tq, d).transpose(2, 3).reshape(b * hkv, tq, h // hkv, d)
        mask = None if mask is None else mask.reshape(b * hkv, tq, 1, n)
    else:
        rows = q.reshape(b * hkv, (h // hkv) * tq, 1, d)
        mask = None if mask is None else mask.reshape(b * hkv, (h // hkv) * tq, 1, n)
    lists = rows.shape[1]
    rows_read = rows_read.map(lambda x: x.reshape(b * hkv, lists, n, x.shape[3]))
    part = kernel.attend(rows, rows_read, softmax, mask=mask)
    if hs == hkv:
        out = part.out.reshape(b, hkv, tq, h // hkv, -1).transpose(2, 3)
        lse = part.lse.reshape(b, hkv, tq, h // hkv).transpose(2, 3)
        return Partial(out.reshape(b, h, tq, -1), lse.reshape(b, h, tq))
    return Partial(part.out.reshape(b, h, tq, -1), part.lse.reshape(b, h, tq))
