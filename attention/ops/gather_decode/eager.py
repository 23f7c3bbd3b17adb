"""``gather_decode``: one flat row gather per tensor, then the library's attention over the gathered rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...partial import Partial, empty_partial
from .. import kernel
from ..rows import gather_rows

if TYPE_CHECKING:
    from ...selection import TokenIndex


def gather_decode(
    q: Tensor, k: Tensor, v: Tensor, index: TokenIndex, *, scale: float, softcap: float | None
) -> Partial:
    b, h, tq, d = q.shape
    hkv = k.shape[1]
    hs, n = index.tokens.shape[1], index.tokens.shape[3]
    if n == 0:
        return empty_partial(q, v.shape[-1])
    if index.gathered is not None:
        key, value = index.gathered
    else:
        # [B, Hs, Tq, K] -> rows per KV head, in the order (heads of the group, queries, K)
        tokens = index.tokens.reshape(b, hkv, -1)
        key, value = gather_rows(k, tokens), gather_rows(v, tokens)
    mask = None
    if index.counts is not None:
        mask = torch.arange(n, device=q.device) < index.counts[..., None]  # [B, Hs, Tq, K]
    if hs == hkv:
        rows = q.reshape(b, hkv, h // hkv, tq, d).transpose(2, 3).reshape(b * hkv, tq, h // hkv, d)
        mask = None if mask is None else mask.reshape(b * hkv, tq, 1, n)
    else:
        rows = q.reshape(b * hkv, (h // hkv) * tq, 1, d)
        mask = None if mask is None else mask.reshape(b * hkv, (h // hkv) * tq, 1, n)
    key = key.reshape(b * hkv, -1, n, d)
    value = value.reshape(b * hkv, -1, n, v.shape[-1])
    part = kernel.attend(rows, key, value, scale=scale, mask=mask, softcap=softcap)
    if hs == hkv:
        out = part.out.reshape(b, hkv, tq, h // hkv, -1).transpose(2, 3)
        lse = part.lse.reshape(b, hkv, tq, h // hkv).transpose(2, 3)
        return Partial(out.reshape(b, h, tq, -1), lse.reshape(b, h, tq))
    return Partial(part.out.reshape(b, h, tq, -1), part.lse.reshape(b, h, tq))
