"""``append`` in Triton: one program a row and KV head writes everything that the new token changes.

    keys      . . . . . . k             place = length - 1, read on the device
    pages     | p0  | p1  |             the page of ``place``: its maximum and minimum take k in
    labels    . . . . . . l             some channels of k
    kept      t t t t k t               the slot whose turn it is

A program writes what no other program reads or writes, so there is nothing to wait for.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...kv import KV
from .. import launch
from .beside import Kept, Labels, Pages


def unsupported(k: Tensor, v: Tensor, kv: KV, length: Tensor, **_: Any) -> list[str]:
    reasons = launch.cannot_attend(k, kv) + launch.no_gradient(k, v)
    if type(kv) is not KV:
        reasons.append(f"keys are stored in the format {kv.format!r}, which no kernel writes")
    return reasons


def append(
    k: Tensor,
    v: Tensor,
    kv: KV,
    length: Tensor,
    *,
    start: Tensor | None,
    pages: Pages | None,
    labels: Labels | None,
    kept: Kept | None,
) -> None:
    b, hkv, _, d = k.shape
    dv = v.shape[3]
    keys, values = kv.stored
    none = (0, 0, 0)
    paged: tuple[Any, ...] = (
        (None, none, 1) if pages is None else (pages.entries, pages.entries.stride()[:3], pages.size)
    )
    labelled: tuple[Any, ...] = (None, none, None, 1)
    if labels is not None:
        entries, channels = labels.entries, labels.channels.contiguous()
        labelled = entries, entries.stride()[:3], channels, channels.shape[1]
    chosen: tuple[Any, ...] = (None, none, None, none, None, none, None, 1)
    if kept is not None:
        own = (kept.tokens, *kept.kv.stored)
        strides = [x.stride()[:3] for x in own]
        chosen = own[0], strides[0], own[1], strides[1], own[2], strides[2], kept.since, own[0].shape[2]
    _append[(b * hkv,)](
        k, v, keys, values, length, start,
        (*k.stride(), *v.stride()), keys.stride()[:3], values.stride()[:3],
        0 if start is None else start.stride(0), hkv,
        *paged, *labelled[:3], *chosen,
        D=d, DV=dv, BD=launch.wide(d), BDV=launch.wide(dv), R=labelled[3], BR=launch.wide(labelled[3]),
        num_warps=1 if d <= 64 else 2,
    )  # fmt: skip


@triton.jit
def _row(x, stride, batch, head, place):
    """Where the row at ``place`` of x [B, Hkv, any, any] begins."""
    return x + batch * stride[0] + head * stride[1] + place * stride[2]


@triton.jit(do_not_specialize=["page", "size"])
def _append(
    k, v, keys, values, length, start,
    snew, skeys, svalues, ss, hkv,
    pages, spages, page,
    labels, slabels, channels,
    tokens, stokens, kept_keys, skept_keys, kept_values, skept_values, since, size,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    R: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    batch, head = (tl.program_id(0) // hkv).to(tl.int64), (tl.program_id(0) % hkv).to(tl.int64)
    place = tl.load(length).to(tl.int64) - 1
    d, dv = tl.arange(0, BD), tl.arange(0, BDV)
    new = k + batch * snew[0] + head * snew[1]
    key = tl.load(new + d * snew[3], mask=d < D, other=0.0)
    value = tl.load(v + batch * snew[4] + head * snew[5] + dv * snew[7], mask=dv < DV, other=0.0)
    tl.store(_row(keys, skeys, batch, head, place) + d, key, mask=d < D)
    tl.store(_row(values, svalues, batch, head, place) + dv, value, mask=dv < DV)
    if pages is not None:
        at = place
        if start is not None:
            at -= tl.load(start + batch * ss).to(tl.int64)
        entry = _row(pages, spages, batch, head, at // page) + d
        begun = d < tl.where(at % page > 0, D, 0)
        there = d < tl.where(at >= 0, D, 0)
        high = tl.load(entry, mask=begun, other=float("-inf"))
        low = tl.load(entry + D, mask=begun, other=float("inf"))
        tl.store(entry, tl.maximum(high, key), mask=there)
        tl.store(entry + D, tl.minimum(low, key), mask=there)
    if labels is not None:
        r = tl.arange(0, BR)
        channel = tl.load(channels + head * R + r, mask=r < R, other=0)
        label = tl.load(new + channel * snew[3], mask=r < R, other=0.0)
        tl.store(_row(labels, slabels, batch, head, place) + r, label, mask=r < R)
    if tokens is not None:
        steps = tl.maximum(place - tl.load(since).to(tl.int64), 1)
        slot = size - 1 - (steps - 1) % size
        tl.store(_row(tokens, stokens, batch, head, slot), place)
        tl.store(_row(kept_keys, skept_keys, batch, head, slot) + d, key, mask=d < D)
        tl.store(_row(kept_values, skept_values, batch, head, slot) + dv, value, mask=dv < DV)
