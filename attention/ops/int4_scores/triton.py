"""Four-bit keys unpacked in registers, multiplied as the small integers they are.

A tile of bytes is two tiles of integers (see quantise.py), and a product over D is two products over D / 2:

    q . key = scale_q * scale_key * (q[:D/2] . low + q[D/2:] . high)  +  q . mean of the key's block

Integers up to 127 * 7 * 256 are exact in the int32 of the matrix units (and up to 7 in every 16-bit type).
The means are few: PER_K blocks of a tile of keys, filled up to the 16 columns a product needs with copies of
themselves. A block's largest logit is its largest varying part plus its mean's, so means are added after the
maximum over the keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .quantise import integers, rounded, row_scale
from .quantise import quantise_int4 as quantise_int4
from .storage import Int4

_BLOCKS = (8, 16, 32, 64, 128)


def unsupported(x: Tensor, keys: Int4 | int, *more: Tensor, **how: Any) -> list[str]:
    if isinstance(keys, Int4):
        reasons = launch.cannot_read(x) + launch.no_gradient(x, *more)
        block = keys.block
        if x.dtype != keys.mean.dtype:
            reasons.append(f"the queries are {x.dtype}, the keys were {keys.mean.dtype}")
        if not all(t[0, 0].is_contiguous() for t in (keys.packed, keys.scale, keys.mean)):
            reasons.append("the four-bit keys of a head do not lie side by side")
    else:
        reasons, block = launch.cannot_read(x) + launch.no_gradient(x), keys
    if block not in _BLOCKS:
        reasons.append(f"blocks of {block} keys are not of 8, 16, 32, 64 or 128")
    return reasons


def int4_scores(q: Tensor, k4: Int4, *, scale: float) -> Tensor:
    b, h, t, d = q.shape
    hkv, n = k4.scale.shape[1:]
    rows = (h // hkv) * t
    new = torch.empty if k4.start is None else torch.zeros
    out = new(b, hkv, h // hkv, t, n, dtype=torch.float32, device=q.device)
    row_tile = min(64, max(16, triton.next_power_of_2(rows)))
    if out.numel():
        _scores[(triton.cdiv(n, 128), triton.cdiv(rows, row_tile), b * hkv)](
            q, k4.packed, k4.scale, k4.mean, out, launch.row_starts(k4.start, q.device),
            *q.stride(), *_strides(k4), hkv, h // hkv, t, n, scale,
            HALF=d // 2, WIDE_HALF=max(32, launch.wide(d // 2)), ROWS=row_tile,
            BLOCK=k4.block, PER_K=128 // k4.block,
            num_warps=8 if q.dtype == torch.float32 else 4,
        )  # fmt: skip
    return out


def int4_block_max(
    q: Tensor,
    k4: Int4,
    row_offset: Tensor,
    *,
    scale: float,
    block_q: int,
    softcap: float | None,
    q_bits: int | None,
) -> Tensor:
    b, h, tq, d = q.shape
    hkv, tk = k4.scale.shape[1:]
    bm, bn, warps = _tile(q.dtype, d, q_bits)
    rows = min(triton.next_power_of_2(block_q), bm)
    splits = triton.cdiv(block_q, rows)
    parts = triton.cdiv(tq, block_q) * splits  # query blocks, or parts of them
    out = q.new_full((b, h, parts, triton.cdiv(tk, k4.block)), -torch.inf, dtype=torch.float32)
    inner, outer = (scale, 0.0) if softcap is None else (scale / softcap, softcap)
    if out.numel():
        _block_max[(triton.cdiv(parts, bm // rows), b * h)](
            q, k4.packed, k4.scale, k4.mean, row_offset, out, launch.row_starts(k4.start, q.device),
            *q.stride(), *_strides(k4), *row_offset.stride(),
            h, h // hkv, tq, tk, parts, out.shape[3], inner, outer,
            HALF=d // 2, WIDE_HALF=max(32, launch.wide(d // 2)),
            LEVELS=0 if q_bits is None else 2 ** (q_bits - 1) - 1,
            BLOCK_Q=block_q, SPLITS=splits, ROWS=rows, PER_Q=bm // rows,
            BLOCK=k4.block, PER_K=max(1, bn // k4.block), SOFTCAP=softcap is not None,
            num_warps=warps, num_stages=2,
        )  # fmt: skip
    return out if splits == 1 else out.unflatten(2, (-1, splits)).amax(3)


def _strides(k4: Int4) -> tuple[int, ...]:
    """From row to row and from head to head; what is within a head lies side by side."""
    return (*k4.packed.stride()[:2], *k4.scale.stride()[:2], *k4.mean.stride()[:2])


def _tile(dtype: torch.dtype, d: int, q_bits: int | None) -> tuple[int, int, int]:
    """(queries, keys, warps): the raw queries (for the means) and the rounded ones stay in shared memory.
    Whole float32 products have no matrix units, so registers are short: small tiles."""
    if dtype == torch.float32:
        return (32, 32, 8) if q_bits is None else (64, 64, 4)
    return (128, 128, 8) if d <= 128 else (64, 128, 4)


@triton.jit
def _scores(
    q_ptr, packed_ptr, scale_ptr, mean_ptr, out_ptr, start_ptr,
    q_b, q_h, q_t, q_d, packed_b, packed_h, scale_b, scale_h, mean_b, mean_h,
    hkv, group, t, n, factor,
    HALF: tl.constexpr, WIDE_HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PER_K: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(2) // hkv).to(tl.int64)
    head = (tl.program_id(2) % hkv).to(tl.int64)
    start = tl.zeros([], tl.int32)
    if start_ptr is not None:
        start = tl.load(start_ptr + batch).to(tl.int32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < group * t
    at_d = tl.arange(0, WIDE_HALF)
    number = at_d < HALF
    # Products are taken keys first, [keys, D / 2] [D / 2, rows]: of few rows there is nothing to share out.
    q_rows = q_ptr + batch * q_b + (head * group + row // t) * q_h + (row % t).to(tl.int64) * q_t
    q_ptrs = q_rows[None, :] + at_d[:, None] * q_d
    q_mask = valid[None, :] & number[:, None]
    q_low = tl.load(q_ptrs, mask=q_mask, other=0.0)
    q_high = tl.load(q_ptrs + HALF * q_d, mask=q_mask, other=0.0)

    first = tl.program_id(0) * PER_K  # block
    key = start + first * BLOCK + tl.arange(0, PER_K * BLOCK)
    known = key < n
    bytes_ptr = packed_ptr + batch * packed_b + head * packed_h + key.to(tl.int64)[:, None] * HALF
    low, high = integers(bytes_ptr + at_d[None, :], known[:, None] & number[None, :])
    step = tl.load(scale_ptr + batch * scale_b + head * scale_h + key, mask=known, other=0.0)
    product = tl.dot(low.to(q_low.dtype), q_low, input_precision="ieee")
    product = tl.dot(high.to(q_low.dtype), q_high, product, input_precision="ieee") * step[:, None]

    block = first + tl.arange(0, 16) % PER_K
    means = (
        mean_ptr + batch * mean_b + head * mean_h + block.to(tl.int64)[:, None] * (2 * HALF) + at_d[None, :]
    )
    mask = (start + block * BLOCK < n)[:, None] & number[None, :]
    of_means = tl.dot(tl.load(means, mask=mask, other=0.0), q_low, input_precision="ieee")
    of_means = tl.dot(tl.load(means + HALF, mask=mask, other=0.0), q_high, of_means, input_precision="ieee")
    of_means = tl.max(tl.reshape(of_means, [16 // PER_K, PER_K, ROWS]), 0)  # of copies
    logits = tl.reshape(product, [PER_K, BLOCK, ROWS]) + of_means[:, None, :]
    logits = tl.reshape(logits, [PER_K * BLOCK, ROWS]) * factor
    out = out_ptr + (tl.program_id(2).to(tl.int64) * group * t + row[None, :]) * n + key[:, None]
    tl.store(out, logits, mask=valid[None, :] & known[:, None])


@triton.jit
def _block_max(
    q_ptr, packed_ptr, scale_ptr, mean_ptr, offset_ptr, out_ptr, start_ptr,
    q_b, q_h, q_t, q_d, packed_b, packed_h, scale_b, scale_h, mean_b, mean_h, o_b, o_h, o_t,
    heads,
    per_kv,  # query heads per KV head
    tq, tk, parts, nk,
    inner,  # logits are inner * q k^T, or outer * tanh(inner * q k^T) with a soft-cap
    outer,
    HALF: tl.constexpr, WIDE_HALF: tl.constexpr,
    LEVELS: tl.constexpr,  # that q is rounded to, or 0: not at all
    BLOCK_Q: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, PER_Q: tl.constexpr,
    BLOCK: tl.constexpr, PER_K: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    # The longest rows first: what is left at the end is short. Tiles are laid out as in block_max.
    first_part = (tl.num_programs(0) - 1 - tl.program_id(0)) * PER_Q
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    past = tk - tq
    start = tl.zeros([], tl.int32)
    if start_ptr is not None:
        start = tl.load(start_ptr + batch).to(tl.int32)
    begin = tl.maximum(start - past, 0)

    at_m = tl.arange(0, PER_Q * ROWS)
    part = first_part + at_m // ROWS
    inside = (part % SPLITS) * ROWS + at_m % ROWS  # place within the query block
    row = begin + (part // SPLITS) * BLOCK_Q + inside
    valid = (inside < BLOCK_Q) & (row < tq) & (part < parts)
    last = past + tl.max(tl.where(valid, row, -past - 1), 0)  # the last position that some row sees
    least = past + tl.min(tl.where(valid, row, tk), 0)  # the last position that all rows see

    at_d = tl.arange(0, WIDE_HALF)
    row64 = row.to(tl.int64)
    low_ptr = q_ptr + batch * q_b + head * q_h + row64[:, None] * q_t + at_d[None, :] * q_d
    q_mask = valid[:, None] & (at_d < HALF)[None, :]
    raw_low = tl.load(low_ptr, mask=q_mask, other=0.0)
    raw_high = tl.load(low_ptr + HALF * q_d, mask=q_mask, other=0.0)
    offset_ptr += batch * o_b + head * o_h
    offset = tl.load(offset_ptr + row64 * o_t, mask=valid, other=float("inf")).to(tl.float32)
    q_low, q_high = raw_low, raw_high
    q_step = tl.full([PER_Q * ROWS], 1.0, tl.float32)
    if LEVELS > 0:
        low32, high32 = raw_low.to(tl.float32), raw_high.to(tl.float32)
        q_step = row_scale(low32, high32, LEVELS)
        q_low = rounded(low32, q_step, LEVELS).to(tl.int8)
        q_high = rounded(high32, q_step, LEVELS).to(tl.int8)

    kv = head // per_kv
    bytes_ptr = packed_ptr + batch * packed_b + kv * packed_h + at_d[:, None]
    scale_ptr += batch * scale_b + kv * scale_h
    means_ptr = mean_ptr + batch * mean_b + kv * mean_h + at_d[:, None]
    number = (at_d < HALF)[:, None]
    at_n = tl.arange(0, PER_K * BLOCK)
    out_part = first_part + tl.arange(0, PER_Q)
    out_rows = out_ptr + (tl.program_id(1).to(tl.int64) * parts + out_part[:, None]) * nk
    reach = tl.maximum(last + 1 - start, 0)  # a tile whose rows are all beyond the row's end reads nothing
    blocks = tl.cdiv(reach, BLOCK)
    whole = tl.minimum(least + 1 - start, reach) // (PER_K * BLOCK) * PER_K
    for diagonal in tl.static_range(2):  # tiles that every row sees whole need no mask
        for j in range(whole if diagonal else 0, blocks if diagonal else whole, PER_K):
            key = start + j * BLOCK + at_n
            seen = key <= last
            low, high = integers(bytes_ptr + key.to(tl.int64)[None, :] * HALF, seen[None, :] & number)
            if LEVELS > 0:
                product = tl.dot(q_low, low, out_dtype=tl.int32)
                product = tl.dot(q_high, high, product, out_dtype=tl.int32).to(tl.float32)
            else:
                product = tl.dot(q_low, low.to(q_low.dtype), input_precision="ieee")
                product = tl.dot(q_high, high.to(q_low.dtype), product, input_precision="ieee")
            product *= tl.load(scale_ptr + key, mask=seen, other=0.0)[None, :]
            if diagonal:
                visible = seen[None, :] & (key[None, :] <= past + row[:, None])
                product = tl.where(visible, product, -float("inf"))
            top = tl.max(tl.reshape(product, [PER_Q * ROWS, PER_K, BLOCK]), 2)
            block = j + tl.arange(0, 16) % PER_K
            means = means_ptr + block.to(tl.int64)[None, :] * (2 * HALF)
            mask = (start + block * BLOCK <= last)[None, :] & number
            of_means = tl.dot(raw_low, tl.load(means, mask=mask, other=0.0), input_precision="ieee")
            m_high = tl.load(means + HALF, mask=mask, other=0.0)
            of_means = tl.dot(raw_high, m_high, of_means, input_precision="ieee")
            of_means = tl.max(tl.reshape(of_means, [PER_Q * ROWS, 16 // PER_K, PER_K]), 1)  # of copies
            none = top == -float("inf")
            if diagonal:  # a row of zeros has step 0, and 0 * -inf would be NaN
                top = tl.where(none, 0.0, top)
            logits = (top * q_step[:, None] + of_means) * inner
            if SOFTCAP:
                logits = launch.tanh(logits) * outer
            logits = logits - offset[:, None]
            if diagonal:
                logits = tl.where(none, -float("inf"), logits)
            best = tl.max(tl.reshape(logits, [PER_Q, ROWS, PER_K]), 1)
            columns = j + tl.arange(0, PER_K)
            mask = (out_part < parts)[:, None] & (columns < nk)[None, :]
            tl.store(out_rows + columns[None, :], best, mask=mask)
