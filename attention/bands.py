"""Attention over keys at regular distances: positions of one residue class are a sequence of their own, with
a sliding window in it."""

from __future__ import annotations

import torch
from torch import Tensor

from .index import Band, Bands
from .keys import Keys
from .kv import KV
from .ops import kernel
from .ops.flash import flash
from .partial import Partial, empty_partial, merge

_PAIRS = 1 << 22  # of query and sink that are masked at a time


def attend_bands(q: Tensor, keys: Keys, index: Bands, impl: str) -> Partial:
    """Attention of prefill queries q [B, H, Tq, D], whose rows are not padded, over ``index``: exactly its
    keys are read."""
    parts = [_band(q, keys, band, impl) for band in index.bands]
    sinks = min(index.sinks, keys.length)
    if sinks:
        parts.append(_sinks(q, keys, index, sinks))
    return merge(*parts)


def _band(q: Tensor, keys: Keys, band: Band, impl: str) -> Partial:
    """One band, a residue class of positions modulo its stride at a time.

    stride = 3, near = 3, far = 9        key   0 1 2 3 4 5 6 7 8
                                   query 6     x . . x . . .
                                   query 7     . x . . x . . .
                                   query 8     . . x . . x . . .
    """
    stride, near, far = band
    size = None if far is None else -((near - far) // stride)  # keys of the class that a query reads
    if size is not None and size < 1:
        return empty_partial(q, keys.kv.value_dim)
    skip = near // stride  # keys of the class that are too near
    if stride == 1 and skip == 0:
        return _class(q, keys.kv, size, keys, impl)
    result = empty_partial(q, keys.kv.value_dim)
    for first in range(keys.past, min(keys.past + stride, keys.length)):  # the first query of a class
        rows = slice(first - keys.past, None, stride)
        before = first // stride - skip  # keys of the class before this one that are far enough
        blind = max(0, -before)  # queries that see none of them
        mine = q[:, :, rows][:, :, blind:]
        if mine.shape[2] == 0:
            continue
        upto = before + blind + mine.shape[2]
        kv = keys.kv[:, :, first % stride :: stride][:, :, :upto]
        part = _class(mine.contiguous(), kv, size, keys, impl)
        result.out[:, :, rows][:, :, blind:] = part.out.to(result.out.dtype)
        result.lse[:, :, rows][:, :, blind:] = part.lse
    return result


def _class(q: Tensor, kv: KV, size: int | None, keys: Keys, impl: str) -> Partial:
    return flash(q, kv, keys.softmax, window=size, impl=impl)


def _sinks(q: Tensor, keys: Keys, index: Bands, sinks: int) -> Partial:
    """The first keys of the row, for the queries in none of whose bands they are."""
    h, tq, hkv = q.shape[1], q.shape[2], keys.kv.num_kv_heads
    far = max((keys.length if band.far is None else band.far) for band in index.bands)
    tile, parts = max(1, _PAIRS // (h // hkv * sinks)), []
    for a in range(0, tq, tile):
        rows = torch.arange(keys.past + a, min(keys.past + a + tile, keys.length), device=q.device)
        mask = None
        if keys.past + a - sinks + 1 < far:  # later queries have them all beyond their bands
            distance = rows[:, None] - torch.arange(sinks, device=q.device)
            mask = (distance >= 0) & ~index.hold(distance.clamp(min=0))  # [rows, sinks]
            mask = mask.repeat(h // hkv, 1)[None, None]
        part = kernel.attend(
            kernel.fold_groups(q[:, :, a : a + tile], hkv),
            keys.kv[:, :, :sinks],
            keys.softmax,
            mask=mask,
        )
        parts.append(kernel.unfold_groups(part, h, len(rows)))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))
