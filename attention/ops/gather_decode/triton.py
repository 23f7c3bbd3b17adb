"""``gather_decode`` in Triton: chosen rows of K and V are read in place, by position.

A program takes one query, one row of the index and one split of its list:

    tokens[b, hs, i]    3  17  18  40  41 | 63  77  80   .   .     . past the count: not loaded
                        `---- split 0 --'   `--- split 1 ---'

Where the heads of a group share a list (Hs = Hkv) they are the rows of one tile, and a key is read once for
all of them; a head with a list of its own (Hs = H) is a tile of one row. ``tl.dot`` wants 16 rows, and the
idle ones cost nothing that a kernel waiting for memory would notice. Lists are ragged: a split is a share of
the row's own count, which is read on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...kv import KV
from ...lists import TokenLists
from ...partial import Partial
from ...softmax import Softmax
from .. import launch
from ..combine import (
    attend_tile,
    combine,
    configs,
    factors,
    number_of_splits,
    scratch,
    store_rows,
    tile_keys,
    tile_rows,
)


def unsupported(q: Tensor, kv: KV, index: TokenLists, softmax: Softmax) -> list[str]:
    kv = kv if index.gathered is None else index.gathered
    reasons = launch.cannot_attend(q, kv) + launch.no_gradient(q, kv)
    if index.gathered is not None and q.shape[2] != 1:
        reasons.append(f"rows gathered beforehand are those of one query, not of {q.shape[2]}")
    return reasons


def gather_decode(q: Tensor, kv: KV, index: TokenLists, softmax: Softmax) -> Partial:
    b, h, tq, d = q.shape
    dv, hs, count = kv.value_dim, index.tokens.shape[1], index.tokens.shape[3]
    if index.gathered is not None:
        kv = index.gathered  # [B, Hs, K]: row n of the list is row n here
    heads = h // hs  # query heads that share a list
    rows = tile_rows(heads, q.element_size())
    tiles = triton.cdiv(heads, rows)
    splits = number_of_splits(tiles * tq * b * hs, count, q.device)
    outs, lses = scratch(q, dv, splits)
    inner, outer = factors(softmax)
    counts = index.counts
    _gather_decode[(tiles * tq, splits, b * hs)](
        q, kv.stored, index.tokens, counts, outs, lses,
        *q.stride(), kv.strides(), *index.tokens.stride(),
        *((0, 0, 0) if counts is None else counts.stride()),
        b, hs, tq, count, inner, outer, launch.bucket(count // splits),
        HEADS=heads, PER_KV=hs // kv.num_kv_heads, D=d, DV=dv, BD=launch.wide(d), BDV=launch.wide(dv),
        ROWS=rows, KEYS=tile_keys(d, dv, q.element_size()),
        RAGGED=counts is not None, GATHERED=index.gathered is not None,
        SOFTCAP=softmax.softcap is not None, LOAD=kv.load_function(), FORMAT=kv.format,
    )  # fmt: skip
    return combine(outs, lses, q.dtype)


@launch.tuned(configs(3), key=["HEADS", "D", "DV", "ROWS", "GATHERED", "SOFTCAP", "FORMAT", "bucket"])
@triton.jit(do_not_specialize=["b", "tq", "count", "bucket"])
def _gather_decode(
    q, kv, tokens, counts, out, lse,
    sqb, sqh, sqt, sqd, skv, stb, sth, stt, stk, scb, sch, sct,
    b, hs, tq, count, inner, outer,
    bucket,  # of the keys of a split; only a key of the tuning
    HEADS: tl.constexpr, PER_KV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    RAGGED: tl.constexpr, GATHERED: tl.constexpr, SOFTCAP: tl.constexpr, LOAD: tl.constexpr,
    FORMAT: tl.constexpr,  # likewise
):  # fmt: skip
    query, tile = tl.program_id(0) % tq, tl.program_id(0) // tq
    split, of = tl.program_id(1), tl.num_programs(1)
    batch, head = (tl.program_id(2) // hs).to(tl.int64), (tl.program_id(2) % hs).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)  # a head of those that share this list
    keep = row < HEADS
    qhead = head * HEADS + row
    at = ((split * b + batch) * (hs * HEADS) + qhead) * tq + query  # place in out and lse, int64

    hi = count
    if RAGGED:
        hi = tl.load(counts + batch * scb + head * sch + query * sct).to(tl.int32)
    share = tl.cdiv(tl.cdiv(hi, of), KEYS) * KEYS
    lo = split * share
    hi = tl.minimum(hi, lo + share)

    d, dv, n = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, KEYS)
    rows = q + batch * sqb + qhead * sqh + query.to(tl.int64) * sqt
    queries = tl.load(rows[:, None] + d[None, :] * sqd, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    tokens += batch * stb + head * sth + query.to(tl.int64) * stt
    kv_head = head // PER_KV
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BDV], tl.float32)
    # A tile's positions are asked for one tile ahead and carried over: keys whose address came from a load of
    # the same turn of the loop would have a single buffer, and no tile would be in flight during another.
    place = (lo + n).to(tl.int64)
    if not GATHERED:
        place = tl.load(tokens + place * stk, mask=lo + n < hi, other=0).to(tl.int64)
    for begin in range(lo, hi, KEYS):
        inside = begin + n < hi
        following = begin + KEYS + n
        ahead = following.to(tl.int64)
        if not GATHERED:
            ahead = tl.load(tokens + ahead * stk, mask=following < hi, other=0).to(tl.int64)
        key = LOAD(kv, skv, 0, batch, kv_head, 0, place, inside, D, BD)
        value = LOAD(kv, skv, 1, batch, kv_head, 0, place, inside, DV, BDV)
        peak, total, acc = attend_tile(
            queries, key, value, inside[None, :], peak, total, acc, inner, outer, SOFTCAP
        )  # fmt: skip
        place = ahead
    store_rows(out, lse, at, keep, dv, peak, total, acc, DV)
