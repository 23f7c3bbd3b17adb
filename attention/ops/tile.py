"""A tile of queries against tiles of keys: what the ``flash`` and ``block_sparse`` kernels share.

The rows of a tile are FOLD query heads of one group times ROWS consecutive queries, so that every key loaded
serves whole heads and short query blocks still fill the matrix unit. Its keys are a list of *slots*, read
BLOCK_N at a time, and their order is that of the list:

    blocks = None     slot s is key  first + s                     (a range of keys)
    blocks = [4, 7]   slot s is key  first + blocks[s // BLOCK_K] * BLOCK_K + s % BLOCK_K

    slot            0          middle                 stop
    row 0           x x x x x x|x x . . . . . .       |        Before ``middle`` every row reads every slot:
    row 1           x x x x x x|x x x . . . . .       |        no mask, no -inf. From there to ``stop`` (EDGE)
    row 2           x x x x x x|x x x x x . . .       |        positions are compared, and a key that no row
                                                               may read is not loaded (0 * NaN is NaN).

Logits are in base 2 inside: 2 ** x is what the hardware computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kv import KV
from ..softmax import Softmax
from . import launch
from .launch import LOG2E, tanh
from .load.rows import load_at


@triton.jit
def load_rows(x, head, row, stride, mask, D: tl.constexpr, WIDE: tl.constexpr):
    """x[head, row, :] as [N, WIDE], zeros where ``mask`` ([N], or None) is False and past D."""
    col = tl.arange(0, WIDE)
    place = (
        x + (head.to(tl.int64) * stride[1] + row.to(tl.int64) * stride[2])[:, None] + col[None, :] * stride[3]
    )
    return load_at(place, mask, D, WIDE)


@triton.jit
def store_rows(x, head, row, stride, mask, value, D: tl.constexpr, WIDE: tl.constexpr):
    """x[head, row, :D] = value [N, WIDE] where ``mask`` [N]."""
    col = tl.arange(0, WIDE)
    place = (
        x + (head.to(tl.int64) * stride[1] + row.to(tl.int64) * stride[2])[:, None] + col[None, :] * stride[3]
    )
    tl.store(place, value.to(x.dtype.element_ty), mask=mask[:, None] & (col < D)[None, :])


@triton.jit
def slots(t, blocks, order, first, count, tk, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions of the keys in slots t * BLOCK_N .. of ``count``, and which of them there are. [BLOCK_N]"""
    inside = tl.arange(0, BLOCK_N)
    slot = t * BLOCK_N + inside
    there = slot < count
    if blocks is None:
        place = first + slot
    elif BLOCK_K % BLOCK_N == 0:  # a tile lies within one block: one number to load
        parts: tl.constexpr = BLOCK_K // BLOCK_N
        block = tl.load(blocks + t // parts, mask=t * BLOCK_N < count, other=0)
        place = first + block * BLOCK_K + t % parts * BLOCK_N + inside
    else:  # several blocks, or pieces of them, side by side in a tile
        place = first + tl.load(blocks + slot // BLOCK_K, mask=there, other=0) * BLOCK_K + slot % BLOCK_K
    there = there & (place < tk)
    if order is not None:
        place = tl.load(order + place, mask=there, other=0).to(tl.int32)
    return place, there


@triton.jit
def below(ascending, count, limit):
    """How many of ascending[:count] are less than ``limit``."""
    found = 0
    for at in range(0, count, 128):
        i = at + tl.arange(0, 128)
        found += tl.sum(
            ((tl.load(ascending + i, mask=i < count, other=0) < limit) & (i < count)).to(tl.int32)
        )
    return found


@triton.jit
def query_tile(
    pid, blocks, counts, start, hs_heads, kv_heads, tq, tk, nq, m,
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Where program ``pid`` stands: its rows, and the part of the index that it walks."""
    chunks: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    pieces: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    tiles = tl.cdiv(tq, BLOCK_Q) * pieces
    # The heads of a group run side by side (they read the same keys), the latest queries of a head first
    # (they read the most, and should not be the last to end).
    chunk, tile = pid % chunks, tiles - 1 - pid // chunks % tiles
    hs = pid // (chunks * tiles)
    b, hs = (hs // hs_heads).to(tl.int64), hs % hs_heads
    n, piece = tile // pieces, tile % pieces

    past = tk - tq
    first = 0
    if start is not None:
        first = tl.load(start + b).to(tl.int32)
    begin = tl.maximum(first - past, 0)  # the row's first valid query, where block 0 begins
    top = begin + n * BLOCK_Q + piece * ROWS
    bottom = tl.minimum(tl.minimum(top + ROWS, begin + (n + 1) * BLOCK_Q), tq)
    r = tl.arange(0, ROWS * FOLD)
    member, row = chunk * FOLD + r // ROWS, top + r % ROWS
    valid = (member < GROUP) & (row < bottom)
    last = past + bottom - 1

    at = (b * hs_heads + hs) * nq + n
    blocks += at * m
    count = tl.where(top < tq, tl.load(counts + at), 0).to(tl.int32)
    return (
        b,
        hs // (hs_heads // kv_heads),
        hs,
        hs * GROUP + member,
        row,
        valid,
        past + top,
        last,
        first,
        blocks,
        count,
    )


@triton.jit
def split(
    blocks, count, order, first, top, last, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(slots, tile where masks begin, tile where the list ends) of the first ``count`` blocks."""
    full = 0
    if order is None:
        full = below(blocks, count, (top + 1 - first) // BLOCK_K)
        count = below(blocks, count, (last - first) // BLOCK_K + 1)
    return count * BLOCK_K, full * BLOCK_K // BLOCK_N, tl.cdiv(count * BLOCK_K, BLOCK_N)


@triton.jit
def attend(
    acc, peak, total, q, position, last, kv, kv_stride, b, head, blocks, order, first, count, tk,
    window, scale, softcap, begin, stop,
    LOAD: tl.constexpr, EDGE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    """Online softmax of q [M, WIDE] at ``position`` [M] over the tiles begin .. stop of the slots.

    acc [M, WIDE_V], peak [M] (base 2) and total [M] are carried; ``last`` is the greatest position of a row.
    """
    factor = scale * LOG2E
    if softcap is not None:
        factor = softcap * LOG2E
    key, there = slots(begin, blocks, order, first, count, tk, BLOCK_K, BLOCK_N)
    for t in range(begin, stop):
        read = None
        if EDGE:
            read = there & (key <= last)
        keys = LOAD(kv, kv_stride, 0, b, head, 0, key.to(tl.int64), read, D, WIDE)
        s = tl.dot(q, tl.trans(keys), input_precision="ieee")  # [M, N]
        if softcap is not None:
            s = tanh(s * (scale / softcap))
        if EDGE:
            seen = read[None, :] & (key[None, :] <= position[:, None])
            if window is not None:
                seen = seen & (key[None, :] > position[:, None] - window)
            s = tl.where(seen, s, -float("inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * factor)
        base = higher
        if EDGE:
            base = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s * factor - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(p, 1)
        value = LOAD(kv, kv_stride, 1, b, head, 0, key.to(tl.int64), read, DV, WIDE_V)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        peak = higher
        # One tile ahead: were they loaded where they are used, the compiler would spend its stages on the
        # chain block number -> key, and each tile would wait for its keys.
        key, there = slots(t + 1, blocks, order, first, count, tk, BLOCK_K, BLOCK_N)
    return acc, peak, total


def fold(rows: int, group: int, most: int) -> tuple[int, int]:
    """(ROWS, FOLD) of a tile of at most ``most`` rows for query blocks of ``rows`` and ``group`` heads."""
    tall = min(most, max(16, triton.next_power_of_2(rows)))
    return tall, min(triton.next_power_of_2(group), most // tall)


def config(block_m: int, block_n: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)


def sized(
    kernel: Any,
    key: list[str],
    half: list[Any],
    wide_half: list[Any],
    single: list[Any],
    whole_blocks: list[Any] | None = None,
) -> Callable[..., launch.Tuned]:
    """The kernel tuned for an element type, a padded head and blocks of keys: sized(...)(dtype, WIDE,
    BLOCK_K). whole_blocks: the configurations for 16-bit heads of at most 128 where a block of keys is a
    whole number of tiles of 128, so that a tile needs one block number; None: ``half``."""
    lists = {"half": half, "wide_half": wide_half, "single": single, "whole_blocks": whole_blocks or half}
    tuned = {name: launch.tuned(configs, key)(kernel) for name, configs in lists.items()}

    def choose(dtype: torch.dtype, wide: int, block_k: int = 0) -> launch.Tuned:
        if dtype == torch.float32 and not launch.INTERPRETED:  # the interpreter is quicker with large tiles
            return tuned["single"]
        if wide > 128:
            return tuned["wide_half"]
        return tuned["whole_blocks" if block_k and block_k % 128 == 0 else "half"]

    return choose


ROWS_OF_A_TILE = {
    "ROWS": lambda args: fold(args["BLOCK_Q"], args["GROUP"], args["BLOCK_M"])[0],
    "FOLD": lambda args: fold(args["BLOCK_Q"], args["GROUP"], args["BLOCK_M"])[1],
}
KEY = ["GROUP", "BLOCK_Q", "BLOCK_K", "D", "bucket"]


def geometry(q: Tensor, dv: int, counts: Tensor, block_q: int, block_k: int) -> dict[str, int]:
    """The constants that the kernels of ``block_sparse`` are compiled for; dv: numbers of a value."""
    d = q.shape[-1]
    return {
        "GROUP": q.shape[1] // counts.shape[1],
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "D": d,
        "DV": dv,
        "WIDE": launch.wide(d),
        "WIDE_V": launch.wide(dv),
    }


def query_tiles(heads: int, tq: int) -> Any:
    """The grid of a kernel that holds queries, for ``heads`` index heads in all."""

    def grid(args: dict[str, Any]) -> tuple[int]:
        pieces, chunks = -(-args["BLOCK_Q"] // args["ROWS"]), -(-args["GROUP"] // args["FOLD"])
        return (heads * -(-tq // args["BLOCK_Q"]) * pieces * chunks,)

    return grid


def cannot_tile(q: Tensor, kv: KV, softmax: Softmax) -> list[str]:
    """Why these kernels cannot serve the arguments."""
    reasons = launch.cannot_attend(q, kv)
    if softmax.scale <= 0:
        reasons.append(f"the scale of the logits, {softmax.scale}, is not positive")
    if softmax.softcap is not None and softmax.softcap <= 0:
        reasons.append(f"the soft-cap, {softmax.softcap}, is not positive")
    return reasons
