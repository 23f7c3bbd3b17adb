"""``flash`` in Triton, forward only: what torch's own kernels cannot do (soft-cap, window, left padding, more
keys than queries) in one launch, KV heads shared by their group, nothing expanded and nothing merged.

A tile of queries reads one range of keys, the window of its first row to the position of its last:

    window = 4, rows at 5 6 7      key  0 1 2 3 4 5 6 7
                               row 5    . . x x x x . .        2        first key that some row reads
                               row 6    . . . x x x x .        4 .. 5   every row reads: no masks
                               row 7    . . . . x x x x        7        last key that some row reads
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kv import KV
from ...partial import Partial, empty_partial
from ...softmax import Softmax
from .. import kernel, launch
from ..launch import finish
from ..tile import attend, cannot_tile, config, fold, load_rows, sized, store_rows


def unsupported(q: Tensor, kv: KV, softmax: Softmax, **_: Any) -> list[str]:
    return cannot_tile(q, kv, softmax) + launch.no_gradient(q, kv)


def better_eager(
    q: Tensor, kv: KV, softmax: Softmax, *, window: int | None, start: Tensor | None, **_: Any
) -> bool:
    """Plain causal attention is what torch's own kernels do best, lse included."""
    plain = window is None and start is None and q.shape[2] == kv.length
    return plain and type(kv) is KV and kernel.serves_groups(q, kv, softmax)


@triton.jit(do_not_specialize=["bucket"])
def _flash(
    q, kv, out, lse, start, q_stride, kv_stride, out_stride, heads, tq, tk,
    window, scale, softcap,
    bucket,  # of the keys that a query may read; only a key of the tuning
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    LOAD: tl.constexpr,
    FORMAT: tl.constexpr,  # likewise
    ROWS: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    tiles = tl.cdiv(tq, ROWS)
    # The heads of a group run side by side (they read the same keys), the latest queries of a head first
    # (they read the most, and should not be the last to end).
    pid = tl.program_id(0)
    chunk, tile = pid % chunks, tiles - 1 - pid // chunks % tiles
    kv_heads = heads // GROUP
    kv_head = pid // (chunks * tiles)
    b, kv_head = (kv_head // kv_heads).to(tl.int64), kv_head % kv_heads

    r = tl.arange(0, ROWS * FOLD)
    member = chunk * FOLD + r // ROWS
    head, row = kv_head * GROUP + member, tile * ROWS + r % ROWS
    valid = (member < GROUP) & (row < tq)
    past = tk - tq
    position = past + row
    lowest = past + tile * ROWS
    last = tl.minimum(lowest + ROWS, tk) - 1

    first = 0
    if start is not None:
        first = tl.load(start + b).to(tl.int32)
    if window is not None:
        first = tl.maximum(first, lowest - window + 1)
    count = tl.maximum(last + 1 - first, 0)
    stop = tl.cdiv(count, BLOCK_N)
    left = 0
    if window is not None:  # keys that have left the window of the last row
        left = tl.minimum(tl.cdiv(tl.maximum(last - window + 1 - first, 0), BLOCK_N), stop)
    middle = tl.maximum(tl.maximum(lowest + 1 - first, 0) // BLOCK_N, left)

    query = load_rows(q + b * q_stride[0], head, row, q_stride, valid, D, WIDE)
    acc = tl.zeros((ROWS * FOLD, WIDE_V), tl.float32)
    peak = tl.full((ROWS * FOLD,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS * FOLD,), tl.float32)
    if window is not None:
        acc, peak, total = attend(
            acc, peak, total, query, position, last, kv, kv_stride, b, kv_head, None, None, first, count,
            tk, window, scale, softcap, 0, left, LOAD, True, 0, BLOCK_N, D, DV, WIDE, WIDE_V,
        )  # fmt: skip
    acc, peak, total = attend(
        acc, peak, total, query, position, last, kv, kv_stride, b, kv_head, None, None, first, count,
        tk, None, scale, softcap, left, middle, LOAD, False, 0, BLOCK_N, D, DV, WIDE, WIDE_V,
    )  # fmt: skip
    acc, peak, total = attend(
        acc, peak, total, query, position, last, kv, kv_stride, b, kv_head, None, None, first, count,
        tk, None, scale, softcap, middle, stop, LOAD, True, 0, BLOCK_N, D, DV, WIDE, WIDE_V,
    )  # fmt: skip
    acc, natural = finish(acc, peak, total)
    store_rows(out + b * out_stride[0], head, row, out_stride, valid, acc, DV, WIDE_V)
    tl.store(lse + (b * heads + head) * tq + row, natural, mask=valid)


def _tile(args: dict[str, Any]) -> tuple[int, int]:
    return fold(args["tq"], args["GROUP"], args["BLOCK_M"])


# 128 rows are two warpgroups of 64; a third stage keeps the next keys on their way during the softmax.
_kernel = sized(
    triton.heuristics({"ROWS": lambda args: _tile(args)[0], "FOLD": lambda args: _tile(args)[1]})(_flash),
    key=["GROUP", "D", "FORMAT", "bucket"],
    half=[config(128, 64, 8, 3), config(128, 128, 8, 3), config(64, 64, 4, 3)],
    wide_half=[config(128, 32, 8, 3), config(64, 32, 4, 3)],
    single=[config(32, 16, 8, 1)],
)


def flash(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int | None,
    start: Tensor | None,
) -> Partial:
    b, h, tq, d = q.shape
    dv, group = kv.value_dim, h // kv.num_kv_heads
    if q.numel() == 0 or kv.length * dv == 0:
        return empty_partial(q, dv)
    out = q.new_empty(b, h, tq, dv)
    lse = torch.empty(b, h, tq, dtype=torch.float32, device=q.device)
    wide = launch.wide(max(d, dv))

    def grid(args: dict[str, Any]) -> tuple[int]:
        tiles, chunks = -(-tq // args["ROWS"]), -(-group // args["FOLD"])
        return (b * kv.num_kv_heads * tiles * chunks,)

    start = launch.row_starts(start, q.device)
    _kernel(q.dtype, wide)[grid](
        q, kv.stored, out, lse, start, q.stride(), kv.strides(), out.stride(), h, tq, kv.length, window,
        float(softmax.scale), softmax.softcap, launch.bucket(min(kv.length, window or kv.length)),
        GROUP=group, D=d, DV=dv, WIDE=launch.wide(d), WIDE_V=launch.wide(dv),
        LOAD=kv.load_function(), FORMAT=kv.format,
    )  # fmt: skip
    return Partial(out, lse)
