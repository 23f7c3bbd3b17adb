"""Selection without sorting: a threshold is searched bit by bit, then what passes it is written in order.

float32 has an order-preserving image in the integers, so the k-th largest score, or the smallest score that
a given mass needs, is found by building its integer from the highest bit down: a bit is set where enough
still lies at or above it. What lies above this edge is taken, and of what lies level with it the first
``room`` entries:

    key      7 9 3 7 1 7 8        k = 4: edge 7, two above it, room for two
    above    . x . . . . x
    level    x . . x . x .
    kept     0 1   3     6        positions, by a running count

Rows of up to 8192 entries are held in the registers of one program: one read, 32 rounds. Longer ones
(``top_k`` of a decode step's tokens: few rows) are cut into chunks, one program each, that count the four
bytes of the edge in turn; their totals meet in integer atomics, which are exact in any order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

_SHORT = 8192  # entries of a row that one program holds: 16 a thread
_CHUNK = 4096
_LOWEST = tl.constexpr(-(2**31))
_MINUS_INF = tl.constexpr(-2139095041)  # the key of -inf


def unsupported(
    scores: Tensor,
    k: int | None = None,
    *,
    order: str | None = None,
    mass: float | None = None,
    threshold: Tensor | None = None,
    most: int | None = None,
) -> list[str]:
    reasons = []
    if scores.dtype not in launch.DTYPES:
        reasons.append(f"{scores.dtype} is none of float16, bfloat16 and float32")
    if k is None and scores.shape[-1] > _SHORT:
        reasons.append(f"rows of {scores.shape[-1]} entries are longer than {_SHORT}")
    return reasons + launch.no_gradient(scores)


def top_k(scores: Tensor, k: int, *, order: str) -> Tensor:
    rows = _rows(scores)
    indices = torch.empty(rows.shape[0], k, dtype=torch.int64, device=scores.device)
    if rows.shape[0] and rows.shape[1] <= _SHORT:
        _launch_short(rows, indices=indices, size=k, HOW=0)
    elif rows.shape[0]:
        _long(rows, k, indices)
    chosen = indices.view(*scores.shape[:-1], k)
    if order == "position":
        return chosen
    rank = torch.sort(scores.gather(-1, chosen), dim=-1, descending=True, stable=True).indices
    return chosen.gather(-1, rank)


def by_mass(probabilities: Tensor, *, mass: float, most: int | None) -> tuple[Tensor, Tensor]:
    return _lists(probabilities, most, mass=mass, HOW=1)


def by_threshold(scores: Tensor, *, threshold: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    return _lists(scores, most, threshold=threshold.contiguous().view(-1), HOW=2)


def _lists(scores: Tensor, most: int | None, **how: Any) -> tuple[Tensor, Tensor]:
    rows = _rows(scores)
    counts = torch.empty(rows.shape[0], dtype=torch.int32, device=scores.device)
    size = 1 if most is None else most
    if most is None and rows.shape[0]:  # count first, learn the longest, then write
        _launch_short(rows, counts=counts, **how)
        size = max(1, int(counts.max()))
    indices = torch.empty(rows.shape[0], size, dtype=torch.int64, device=scores.device)
    if rows.shape[0]:
        _launch_short(rows, indices=indices, counts=counts, size=size, **how)
    return indices.view(*scores.shape[:-1], size), counts.view(scores.shape[:-1])


def _rows(scores: Tensor) -> Tensor:
    rows = scores.reshape(-1, scores.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch_short(
    rows: Tensor,
    *,
    HOW: int,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    size: int = 0,
    mass: float = 0.0,
    threshold: Tensor | None = None,
) -> None:
    block = max(32, triton.next_power_of_2(rows.shape[1]))
    _short[(rows.shape[0],)](
        rows,
        rows if threshold is None else threshold,
        rows if indices is None else indices,
        rows if counts is None else counts,
        rows.stride(0),
        rows.shape[1],
        size,
        mass,
        HOW=HOW,
        WRITE=indices is not None,
        BLOCK=block,
        num_warps=max(1, block // 512),
    )


def _long(rows: Tensor, k: int, indices: Tensor) -> None:
    count, n = rows.shape
    chunks = triton.cdiv(n, _CHUNK)
    totals = torch.zeros(count, 4, 256, dtype=torch.int32, device=rows.device)
    tallies = torch.empty(count, 2, chunks, dtype=torch.int32, device=rows.device)
    grid = (count * chunks,)
    for byte in range(4):
        _count_byte[grid](rows, totals, rows.stride(0), n, k, chunks, BYTE=byte, CHUNK=_CHUNK, num_warps=8)
    _tally[grid](rows, totals, tallies, rows.stride(0), n, k, chunks, CHUNK=_CHUNK, num_warps=8)
    width = triton.next_power_of_2(chunks)
    _compact[grid](
        rows, totals, tallies, indices, rows.stride(0), n, k, chunks, CHUNK=_CHUNK, WIDTH=width, num_warps=8
    )


@triton.jit
def _key(x):
    """float32 -> int32 in the same order; the two zeros are equal, NaN is above everything."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, 0x7FFFFFFE, bits)  # one less than the largest: an edge can be passed by 1


@triton.jit
def _at_or_above(key, edge, MASS: tl.constexpr):
    """How many keys are at least ``edge``, or the sum of their numbers (of positive numbers, MASS)."""
    if MASS:  # a positive float's key is its own bits, so the numbers need no registers beside the keys
        total = tl.sum(tl.where(key >= tl.maximum(edge, 1), key.to(tl.float32, bitcast=True), 0.0), 0)
    else:
        total = tl.sum((key >= edge).to(tl.int32), 0)
    return total


@triton.jit
def _edge(key, goal, MASS: tl.constexpr):
    """The largest integer at or above which there are ``goal`` keys, or a mass of ``goal``."""
    edge = tl.where(_at_or_above(key, 0, MASS) >= goal, 0, _LOWEST)
    for bit in range(31):
        higher = edge + (1 << (30 - bit))
        edge = tl.where(_at_or_above(key, higher, MASS) >= goal, higher, edge)
    return edge


@triton.jit
def _short(
    x_ptr,
    threshold_ptr,
    indices_ptr,
    counts_ptr,
    row_stride,
    n,
    size,
    mass,
    HOW: tl.constexpr,  # 0: the ``size`` largest, 1: by mass, 2: by threshold; of these two at most ``size``
    WRITE: tl.constexpr,  # else only the counts
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(x_ptr + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    key = tl.where(inside, _key(x), _LOWEST)  # below -inf: never chosen
    if HOW == 0:
        edge = _edge(key, size, False)
        count = size
        room = size - _at_or_above(key, edge + 1, False)
    elif HOW == 1:
        # A subset summed by the same tree never exceeds the whole, so a goal at or below it is reached.
        goal = mass * _at_or_above(key, 0, True)
        edge = tl.maximum(_edge(key, goal, True), 0)
        rest = tl.ceil((goal - _at_or_above(key, edge + 1, True)) / edge.to(tl.float32, bitcast=True))
        above = _at_or_above(key, edge + 1, False)
        level = _at_or_above(key, edge, False) - above
        room = tl.minimum(tl.maximum(rest, 1.0), level.to(tl.float32)).to(tl.int32)
        room = tl.where(edge > 0, room, 0)  # edge 0: there is no mass
        count = above + room
    else:
        edge = tl.maximum(_key(tl.load(threshold_ptr + row)), _MINUS_INF + 1)
        room = n
        count = _at_or_above(key, edge, False)
    if WRITE:
        if HOW != 0:  # noqa: SIM102 - one is settled by the compiler, the other on the device
            if count > size:
                edge = _edge(key, size, False)
                room = size - _at_or_above(key, edge + 1, False)
                count = size + 0
        equal = key == edge
        keep = (key > edge) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
        out = indices_ptr + row * size
        tl.store(out + tl.cumsum(keep.to(tl.int32), 0) - 1, at.to(tl.int64), mask=keep)
        if HOW != 0:
            first = tl.min(tl.where(keep, at, BLOCK), 0)
            first = tl.where(count > 0, first, 0).to(tl.int64)
            tl.store(out + at, first + tl.zeros([BLOCK], tl.int64), mask=(at >= count) & (at < size))
    if HOW != 0:
        tl.store(counts_ptr + row, count)


@triton.jit
def _load_chunk(x_ptr, row_stride, n, chunks, CHUNK: tl.constexpr):
    """This program's row, chunk, positions, and their keys as unsigned integers."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < n
    x = tl.load(x_ptr + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    key = tl.where(inside, _key(x), _LOWEST)
    return row, chunk, at, key.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _found(totals_ptr, row, k, BYTES: tl.constexpr):
    """The first BYTES bytes of the edge, and how many keys to take that begin with them."""
    digit = tl.arange(0, 256)
    prefix = tl.zeros([], tl.uint32)
    room = k
    for byte in tl.static_range(BYTES):
        counted = tl.load(totals_ptr + (row * 4 + byte) * 256 + digit)
        above = tl.sum(counted, 0) - tl.cumsum(counted, 0)
        here = (above < room) & (above + counted >= room)
        prefix = prefix * 256 + tl.sum(tl.where(here, digit, 0), 0).to(tl.uint32)
        room -= tl.sum(tl.where(here, above, 0), 0)
    return prefix, room


@triton.jit
def _count_byte(x_ptr, totals_ptr, row_stride, n, k, chunks, BYTE: tl.constexpr, CHUNK: tl.constexpr):
    row, _chunk, at, key = _load_chunk(x_ptr, row_stride, n, chunks, CHUNK)
    counts = at < n
    if BYTE > 0:
        prefix, _room = _found(totals_ptr, row, k, BYTE)
        counts = counts & ((key >> (32 - 8 * BYTE)) == prefix)
    digit = ((key >> (24 - 8 * BYTE)) & 255).to(tl.int32)
    counted = tl.histogram(digit, 256, mask=counts)
    bins = tl.arange(0, 256)
    tl.atomic_add(totals_ptr + (row * 4 + BYTE) * 256 + bins, counted, mask=counted > 0, sem="relaxed")


@triton.jit
def _tally(x_ptr, totals_ptr, tallies_ptr, row_stride, n, k, chunks, CHUNK: tl.constexpr):
    row, chunk, _at, key = _load_chunk(x_ptr, row_stride, n, chunks, CHUNK)
    edge, _room = _found(totals_ptr, row, k, 4)
    tl.store(tallies_ptr + row * 2 * chunks + chunk, tl.sum((key > edge).to(tl.int32), 0))
    tl.store(tallies_ptr + (row * 2 + 1) * chunks + chunk, tl.sum((key == edge).to(tl.int32), 0))


@triton.jit
def _compact(
    x_ptr,
    totals_ptr,
    tallies_ptr,
    indices_ptr,
    row_stride,
    n,
    k,
    chunks,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, chunk, at, key = _load_chunk(x_ptr, row_stride, n, chunks, CHUNK)
    edge, room = _found(totals_ptr, row, k, 4)
    earlier = tl.arange(0, WIDTH)
    above_before = tl.sum(tl.load(tallies_ptr + row * 2 * chunks + earlier, mask=earlier < chunk, other=0), 0)
    level_before = tl.sum(
        tl.load(tallies_ptr + (row * 2 + 1) * chunks + earlier, mask=earlier < chunk, other=0), 0
    )
    equal = key == edge
    keep = (key > edge) | (equal & (level_before + tl.cumsum(equal.to(tl.int32), 0) <= room))
    slot = above_before + tl.minimum(level_before, room) + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(indices_ptr + row * k + slot, at.to(tl.int64), mask=keep)
