"""``estimate_topk`` in Triton, in three launches; the length and the starts are read on the device.

    _estimate   a tile of entries for all heads of a group: float32 logits, and each head's maximum and sum
                of exponentials in the tile
    _reduce     the shares of the heads, from these sums, and their sum or maximum over the group
    _choose     one program a list: the k-th largest score by counting digits, and what is at or above it

A grid is for as many entries as the buffers have room for. Entries outside a row, before its start or past
its length, are not loaded, and a program that has no others returns at once. Where nothing is reduced there
is no ``_reduce``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...lists import TokenLists
from ...softmax import Softmax
from .. import launch
from ..launch import LOG2E

_CHUNK = 2048  # scores that _choose looks at together
_MOST_HEADS = 128  # of a group: rows of a tile


def unsupported(
    q: Tensor, entries: Tensor, softmax: Softmax, length: Tensor, k: int | None, **_: Any
) -> list[str]:
    reasons = launch.cannot_read(q, entries, largest=1 << 16) + launch.no_gradient(q, entries)
    if (group := q.shape[1] // entries.shape[1]) > _MOST_HEADS:
        reasons.append(f"{group} query heads share a KV head, more than {_MOST_HEADS}")
    return reasons


def estimate_topk(
    q: Tensor,
    entries: Tensor,
    softmax: Softmax,
    length: Tensor,
    k: int | None,
    *,
    fraction: float | None,
    page: int | None,
    channels: Tensor | None,
    reduce: str,
    start: Tensor | None,
) -> TokenLists:
    b, h, _, d = q.shape
    hkv, room = entries.shape[1], entries.shape[2]
    group, reduces = h // hkv, reduce != "none" and h > hkv
    hs = hkv if reduces or h == hkv else h
    most = int((fraction or 0.0) * room * (page or 1)) + 1 if k is None else k
    size = min(most, room) if page is None else page * -(-most // page)
    width = d if channels is None else channels.shape[1]
    cols = 64 if q.dtype == torch.float32 else 128
    piece = min(launch.wide(width), 32 if q.dtype == torch.float32 else 64)
    tiles = triton.cdiv(room, cols)
    logits = torch.empty(b, hkv, group, room, dtype=torch.float32, device=q.device)
    sums = torch.empty(b, hkv, group, 2, tiles, dtype=torch.float32, device=q.device)
    softcap, where = softmax.softcap, (length, start, 0 if start is None else start.stride(0))
    _estimate[(tiles, b * hkv)](
        q, entries, channels, logits, sums, *where,
        *q.stride(), *entries.stride(), hkv, room, tiles, page, softmax.scale, softcap,
        GROUP=group, D=width, PIECE=piece, ROWS=launch.wide(group), COLS=cols, SUMS=reduces,
    )  # fmt: skip
    ranked = logits
    if reduces:
        ranked = torch.empty(b, hkv, room, dtype=torch.float32, device=q.device)
        _reduce[(triton.cdiv(room, _CHUNK), b * hkv)](
            logits, sums, ranked, *where, hkv, room, tiles, page,
            GROUP=group, COLS=cols, CHUNK=_CHUNK, SUM=reduce == "sum", num_warps=8,
        )  # fmt: skip
    tokens = torch.empty(b, hs, 1, size, dtype=torch.int32, device=q.device)
    counts = torch.empty(b, hs, 1, dtype=torch.int32, device=q.device)
    _choose[(b * hs,)](
        ranked, tokens, counts, *where, hs, room, k or 0, size, page,
        FRACTION=fraction, CHUNK=_CHUNK, num_warps=8,
    )  # fmt: skip
    return TokenLists(tokens=tokens, counts=counts)


@triton.jit
def _range(length, start, ss, batch, page):
    """(first position of the row, first entry to rank, entry to stop at). A query's own page is not
    ranked."""
    last = tl.load(length).to(tl.int32)
    first = 0
    if start is not None:
        first = tl.load(start + batch * ss).to(tl.int32)
    lo, hi = first, last
    if page is not None:
        lo, hi = 0, (last - first - 1) // page
    return first, lo, hi


@triton.jit(do_not_specialize=["page"])
def _estimate(
    q, entries, channels, logits, sums, length, start, ss,
    sqb, sqh, sqt, sqd, seb, seh, sen, sed, hkv, room, tiles, page, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    tile, of = tl.program_id(0), tl.program_id(1)
    batch, head = (of // hkv).to(tl.int64), (of % hkv).to(tl.int64)
    _first, lo, hi = _range(length, start, ss, batch, page)
    if (tile * COLS < hi) & (tile * COLS + COLS > lo):
        col, row, d = tile * COLS + tl.arange(0, COLS), tl.arange(0, ROWS), tl.arange(0, PIECE)
        here, there = (row < GROUP)[:, None], (col >= lo) & (col < hi)
        rows = q + batch * sqb + (head * GROUP + row)[:, None] * sqh
        columns = entries + batch * seb + head * seh + col.to(tl.int64)[None, :] * sen
        acc = tl.zeros([ROWS, COLS], tl.float32)
        for begin in range(0, D, PIECE):
            at = begin + d
            own = at
            if channels is not None:
                own = tl.load(channels + head * D + at, mask=at < D, other=0)
            queries = tl.load(rows + own[None, :] * sqd, mask=here & (at < D)[None, :], other=0.0)
            mask = there[None, :] & (at < D)[:, None]
            if page is None:
                keys = tl.load(columns + at[:, None] * sed, mask=mask, other=0.0)
                acc = tl.dot(queries, keys, acc, input_precision="ieee")
            else:  # max(q max, q min) is q+ max + q- min
                zero = tl.zeros_like(queries)
                high = tl.load(columns + at[:, None] * sed, mask=mask, other=0.0)
                acc = tl.dot(tl.maximum(queries, zero), high, acc, input_precision="ieee")
                low = tl.load(columns + (D + at)[:, None] * sed, mask=mask, other=0.0)
                acc = tl.dot(tl.minimum(queries, zero), low, acc, input_precision="ieee")
        acc = acc * scale
        if softcap is not None:
            acc = softcap * launch.tanh(acc / softcap)
        out = (of.to(tl.int64) * GROUP + row)[:, None]
        tl.store(logits + out * room + col[None, :], acc, mask=here & there[None, :])
        if SUMS:
            acc = tl.where(there[None, :], acc, float("-inf"))
            peak = tl.max(acc, 1)  # [ROWS]; a tile that is run has an entry
            total = tl.sum(tl.exp2((acc - peak[:, None]) * LOG2E), 1)
            place = sums + (of.to(tl.int64) * GROUP + row) * 2 * tiles + tile
            tl.store(place, peak, mask=row < GROUP)
            tl.store(place + tiles, total, mask=row < GROUP)


@triton.jit(do_not_specialize=["page"])
def _reduce(
    logits, sums, ranked, length, start, ss, hkv, room, tiles, page,
    GROUP: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    chunk, of = tl.program_id(0), tl.program_id(1)
    _first, lo, hi = _range(length, start, ss, of // hkv, page)
    if (chunk * CHUNK < hi) & (chunk * CHUNK + CHUNK > lo):
        col = chunk * CHUNK + tl.arange(0, CHUNK)
        there = (col >= lo) & (col < hi)
        result = tl.zeros([CHUNK], tl.float32)
        for member in range(GROUP):
            row = of.to(tl.int64) * GROUP + member
            peak, total = tl.full([CHUNK], float("-inf"), tl.float32), tl.zeros([CHUNK], tl.float32)
            for begin in range(lo // COLS, tl.cdiv(hi, COLS), CHUNK):
                tile = begin + tl.arange(0, CHUNK)
                known = tile < tl.cdiv(hi, COLS)
                high = tl.load(sums + row * 2 * tiles + tile, mask=known, other=float("-inf"))
                more = tl.load(sums + (row * 2 + 1) * tiles + tile, mask=known, other=0.0)
                new = tl.maximum(peak, high)
                safe = tl.where(new == float("-inf"), 0.0, new)
                total = total * tl.exp2((peak - safe) * LOG2E) + more * tl.exp2((high - safe) * LOG2E)
                peak = new
            highest = tl.max(peak, 0)
            whole = tl.sum(total * tl.exp2((peak - highest) * LOG2E), 0)
            x = tl.load(logits + row * room + col, mask=there, other=float("-inf"))
            share = tl.exp2((x - highest) * LOG2E) / whole
            if SUM:
                result += share
            else:
                result = tl.maximum(result, share)
        tl.store(ranked + of.to(tl.int64) * room + col, result, mask=there)


@triton.jit
def _scores(ranked, at, hi):
    """The scores at positions ``at`` below ``hi`` as unsigned integers of the same order."""
    x = tl.load(ranked + at, mask=at < hi, other=0.0)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _next_digit(
    ranked, lo, hi, edge, left, SHIFT: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """The key of the k-th largest score, by BITS bits more than ``edge`` has of it, and how many of the
    scores that begin like it are among the k largest."""
    bins = tl.arange(0, 2048)
    counted = tl.zeros([2048], tl.int32)
    for begin in range(lo, hi, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        key = _scores(ranked, at, hi)
        matches = at < hi
        if SHIFT + BITS < 32:
            matches = matches & ((key >> (SHIFT + BITS)) == edge)
        digit = ((key >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        counted += tl.histogram(digit, 2048, mask=matches)
    above = tl.sum(counted, 0) - tl.cumsum(counted, 0)
    here = (above < left) & (above + counted >= left)
    edge = edge * (1 << BITS) + tl.sum(tl.where(here, bins, 0), 0).to(tl.uint32)
    return edge, left - tl.sum(tl.where(here, above, 0), 0)


@triton.jit(do_not_specialize=["k", "page", "size"])
def _choose(
    ranked, tokens, counts, length, start, ss, hs, room, k, size, page,
    FRACTION: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, lo, hi = _range(length, start, ss, row // hs, page)
    ranked += row * room
    tokens += row * size
    seen = tl.load(length).to(tl.int32) - first
    budget = k
    if FRACTION is not None:  # rounded to even, in float64, as Python rounds
        exact = seen.to(tl.float64) * FRACTION
        below = tl.floor(exact).to(tl.int32)
        rest = exact - below.to(tl.float64)
        up = (rest > 0.5) | ((rest == 0.5) & (below % 2 == 1))
        budget = tl.maximum(below + up.to(tl.int32), 1)
    want = tl.minimum(budget, seen)
    if page is not None:
        want = tl.minimum(tl.where(budget >= seen, hi, tl.maximum(budget // page, 1) - 1), hi)
    inside = tl.arange(0, CHUNK)
    edge, left = tl.zeros([], tl.uint32), want
    edge, left = _next_digit(ranked, lo, hi, edge, left, 21, 11, CHUNK)
    edge, left = _next_digit(ranked, lo, hi, edge, left, 10, 11, CHUNK)
    edge, left = _next_digit(ranked, lo, hi, edge, left, 0, 10, CHUNK)
    taken, level, stop = 0, 0, tl.where(want > 0, hi, lo)
    for begin in range(lo, stop, CHUNK):
        at = begin + inside
        key = _scores(ranked, at, stop)
        equal = (key == edge) & (at < stop)
        room_left = level + tl.cumsum(equal.to(tl.int32), 0) <= left
        keep = ((key > edge) & (at < stop)) | (equal & room_left)
        slot = taken + tl.cumsum(keep.to(tl.int32), 0) - 1
        if page is None:
            tl.store(tokens + slot, at, mask=keep)
        else:
            for j in range(page):
                tl.store(tokens + slot * page + j, first + at * page + j, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)
        level += tl.sum(equal.to(tl.int32), 0)
    count = want
    if page is not None:  # the query's own page, as far as it is filled, comes last
        filled = seen - hi * page
        for begin in range(0, filled, CHUNK):
            j = begin + inside
            tl.store(tokens + want * page + j, first + hi * page + j, mask=j < filled)
        count = want * page + filled
    tl.store(counts + row, count)
