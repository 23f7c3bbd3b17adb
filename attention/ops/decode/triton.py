"""``decode`` in Triton: each key is read once, by one program, for all the rows of its KV head.

The G query heads of a KV head times the Tq queries are the rows of one tile, in the order (query, head):

    row   query  head        keys of its KV head, Tk = 6, Tq = 2, window = 4
     0      0     0            . x x x x .
     1      0     1            . x x x x .        lo = the first row's first key,
     2      1     0            . . x x x x        hi = the last row's own key: what a row of the
     3      1     1            . . x x x x        tile may not read is masked in the logits
                                 lo ..... hi

Outside lo .. hi (left padding, keys behind the window) nothing is loaded. The keys lo .. hi are cut into
splits (see ``ops/combine.py``); where a row begins is read on the device, so nothing waits for the host.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...kv import KV
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


def unsupported(q: Tensor, kv: KV, softmax: Softmax, **_: Any) -> list[str]:
    return launch.cannot_attend(q, kv) + launch.no_gradient(q, kv)


def decode(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int | None,
    start: Tensor | None,
) -> Partial:
    b, h, tq, d = q.shape
    hkv, tk, dv = kv.num_kv_heads, kv.length, kv.value_dim
    group = h // hkv
    rows = tile_rows(group * tq, q.element_size())
    tiles = triton.cdiv(group * tq, rows)
    seen = tk if window is None else min(tk, window + tq - 1)
    splits = number_of_splits(tiles * b * hkv, seen, q.device)
    outs, lses = scratch(q, dv, splits)
    inner, outer = factors(softmax)
    _decode[(tiles, splits, b * hkv)](
        q, kv.stored, start, outs, lses,
        *q.stride(), kv.strides(), 0 if start is None else start.stride(0),
        b, hkv, tq, tk, tk if window is None else window, inner, outer,
        launch.bucket(seen // splits), GROUP=group, D=d, DV=dv, BD=launch.wide(d), BDV=launch.wide(dv),
        ROWS=rows, KEYS=tile_keys(d, dv, q.element_size()),
        SEVERAL=tq > 1, PADDED=start is not None, SOFTCAP=softmax.softcap is not None,
        LOAD=kv.load_function(), FORMAT=kv.format,
    )  # fmt: skip
    return combine(outs, lses, q.dtype)


@launch.tuned(configs(3), key=["GROUP", "D", "DV", "ROWS", "SEVERAL", "SOFTCAP", "FORMAT", "bucket"])
@triton.jit(do_not_specialize=["b", "tq", "tk", "window", "bucket"])
def _decode(
    q, kv, start, out, lse,
    sqb, sqh, sqt, sqd, skv, ss,
    b, hkv, tq, tk, window, inner, outer,
    bucket,  # of the keys of a split; only a key of the tuning
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    SEVERAL: tl.constexpr, PADDED: tl.constexpr, SOFTCAP: tl.constexpr,
    LOAD: tl.constexpr,
    FORMAT: tl.constexpr,  # likewise
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (query, head of the group)
    split, of = tl.program_id(1), tl.num_programs(1)
    batch, head = tl.program_id(2) // hkv, tl.program_id(2) % hkv
    keep = row < GROUP * tq
    query = row // GROUP
    qhead = head * GROUP + row % GROUP
    position = tk - tq + query
    at = ((split * b + batch).to(tl.int64) * (hkv * GROUP) + qhead) * tq + query  # place in out and lse

    first = tl.program_id(0) * ROWS // GROUP
    last = tl.minimum((tl.program_id(0) * ROWS + ROWS - 1) // GROUP, tq - 1)
    lo, hi = tl.maximum(tk - tq + first - window + 1, 0), tk - tq + last + 1
    if PADDED:
        lo = tl.maximum(lo, tl.load(start + batch * ss).to(tl.int32))
    share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), of), KEYS) * KEYS
    lo += split * share
    hi = tl.minimum(hi, lo + share)

    d, dv, n = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, KEYS)
    rows = q + batch.to(tl.int64) * sqb + qhead.to(tl.int64) * sqh + query.to(tl.int64) * sqt
    queries = tl.load(rows[:, None] + d[None, :] * sqd, mask=keep[:, None] & (d < D)[None, :], other=0.0)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BDV], tl.float32)
    for begin in range(lo, hi, KEYS):
        inside = n < hi - begin
        # The tile's place in int64, the offsets inside it in int32: cheap, and safe past 2^31 elements.
        key = LOAD(kv, skv, 0, batch, head, begin, n, inside, D, BD)
        value = LOAD(kv, skv, 1, batch, head, begin, n, inside, DV, BDV)
        place = begin + n[None, :]
        valid = place < hi
        if SEVERAL:
            valid = valid & (place <= position[:, None]) & (place > position[:, None] - window)
        peak, total, acc = attend_tile(
            queries, key, value, valid, peak, total, acc, inner, outer, SOFTCAP
        )  # fmt: skip
    store_rows(out, lse, at, keep, dv, peak, total, acc, DV)
