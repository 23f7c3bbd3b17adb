"""Four-bit keys in Triton: how they are made, and how a kernel reads them.

A program takes one block of keys. A byte holds numbers d and D / 2 + d of a key, so a tile of bytes is two
tiles of integers with a shift each, and nothing is interleaved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .storage import Int4


def quantise_int4(k: Tensor, block: int, *, start: Tensor | None) -> Int4:
    b, h, t, d = k.shape
    new = torch.empty if start is None else torch.zeros  # the kernel does not write the padding
    packed = new(b, h, t, d // 2, dtype=torch.uint8, device=k.device)
    scale = new(b, h, t, dtype=torch.float32, device=k.device)
    mean = torch.empty(b, h, triton.cdiv(t, block), d, dtype=k.dtype, device=k.device)
    if mean.numel():
        _quantise[(mean.shape[2], b * h)](
            k, packed, scale, mean, launch.row_starts(start, k.device), *k.stride(), h, t,
            HALF=d // 2, WIDE_HALF=launch.wide(d // 2), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return Int4(packed=packed, scale=scale, mean=mean, block=block, start=start)


@triton.jit
def _quantise(
    k_ptr, packed_ptr, scale_ptr, mean_ptr, start_ptr, k_b, k_h, k_t, k_d, heads, t,
    HALF: tl.constexpr, WIDE_HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    start = tl.zeros([], tl.int32)
    if start_ptr is not None:
        start = tl.load(start_ptr + head // heads).to(tl.int32)
    key = start + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at_d = tl.arange(0, WIDE_HALF)
    held = key < t
    number = at_d < HALF
    k_ptr += (head // heads) * k_b + (head % heads) * k_h
    low_ptr = k_ptr + key.to(tl.int64)[:, None] * k_t + at_d[None, :] * k_d
    mask = held[:, None] & number[None, :]
    low = tl.load(low_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(low_ptr + HALF * k_d, mask=mask, other=0.0).to(tl.float32)

    count = tl.maximum(tl.sum(held.to(tl.int32), 0), 1).to(tl.float32)
    low_mean = tl.div_rn(tl.sum(low, 0), count).to(mean_ptr.dtype.element_ty)
    high_mean = tl.div_rn(tl.sum(high, 0), count).to(mean_ptr.dtype.element_ty)
    means = mean_ptr + (head * tl.num_programs(0) + tl.program_id(0)) * 2 * HALF + at_d
    tl.store(means, low_mean, mask=number)
    tl.store(means + HALF, high_mean, mask=number)

    # What the mean lost to rounding stays in the key.
    low = tl.where(mask, low - low_mean.to(tl.float32)[None, :], 0.0)
    high = tl.where(mask, high - high_mean.to(tl.float32)[None, :], 0.0)
    scale = row_scale(low, high, 7)
    byte = (rounded(low, scale, 7).to(tl.int32) & 15) | ((rounded(high, scale, 7).to(tl.int32) & 15) << 4)
    at = head * t + key
    tl.store(scale_ptr + at, scale, mask=held)
    tl.store(packed_ptr + at[:, None] * HALF + at_d[None, :], byte.to(tl.uint8), mask=mask)


@triton.jit
def row_scale(low, high, LEVELS: tl.constexpr):
    """Each row's largest magnitude over LEVELS, as ``storage.round_rows`` has it."""
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    return tl.div_rn(largest, tl.zeros_like(largest) + LEVELS)


@triton.jit
def rounded(x, scale, LEVELS: tl.constexpr):
    """x [N, ...] over its row's scale [N], to the nearest whole number; halves go up."""
    step = tl.where(scale > 0, scale, 1.0)
    whole = tl.floor(tl.div_rn(x, tl.zeros_like(x) + step[:, None]) + 0.5)
    return tl.minimum(tl.maximum(whole, -LEVELS), LEVELS)


@triton.jit
def integers(ptr, mask):
    """The two numbers of each byte at ``ptr``, as int8."""
    byte = tl.load(ptr, mask=mask, other=0).to(tl.int8, bitcast=True)
    return (byte << 4) >> 4, byte >> 4
