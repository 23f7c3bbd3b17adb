"""How Triton kernels load rows of ``quantised.Quantised``, with the arguments of ``plain.load_plain``.
Imported only by kernels.

``stride`` ends with (first, packed, group, value_group); see ``Quantised.strides``. A position before
``packed`` is decoded in float32 and rounded to the dtype of the recent rows, which the later ones are loaded
from.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .plain import load_plain


@triton.jit
def _load(
    kv, stride, PART: tl.constexpr, batch, head, base, row, mask, D: tl.constexpr, WIDE: tl.constexpr,
    BITS: tl.constexpr, OUTLIERS: tl.constexpr,
):  # fmt: skip
    first, packed, group, value_group = stride[8]
    place = (base + row).to(tl.int64)
    old = place < packed
    late = place >= packed
    if mask is not None:
        old = old & mask
        late = late & mask
    col = tl.arange(0, WIDE)
    inside = old[:, None] & (col < D)[None, :]

    codes, by = kv[2 * PART], stride[2 * PART]
    codes += tl.cast(batch, tl.int64) * by[0] + tl.cast(head, tl.int64) * by[1]
    if BITS == 8:
        code = tl.load(codes + place[:, None] * by[2] + col[None, :] * by[3], mask=inside, other=0)
    else:
        half: tl.constexpr = D // 2
        byte = tl.load(codes + place[:, None] * by[2] + (col % half)[None, :] * by[3], mask=inside, other=0)
        code = tl.where((col < half)[None, :], byte & 15, byte >> 4)

    steps, by = kv[2 * PART + 1], stride[2 * PART + 1]
    steps += tl.cast(batch, tl.int64) * by[0] + tl.cast(head, tl.int64) * by[1]
    if PART == 0:
        at = steps + ((place + first) >> group)[:, None] * by[2] + col[None, :] * by[3]
        zero = tl.load(at + D * by[3], mask=inside, other=0.0)
    else:
        at = steps + place[:, None] * by[2] + (col // value_group)[None, :] * by[3]
        zero = tl.load(at + (D // value_group) * by[3], mask=inside, other=0.0)
    scale = tl.load(at, mask=inside, other=0.0)
    rows = zero.to(tl.float32) + scale.to(tl.float32) * code.to(tl.float32)

    if PART == 0 and OUTLIERS > 0:
        kept, by = kv[6], stride[6]
        kept += tl.cast(batch, tl.int64) * by[0] + tl.cast(head, tl.int64) * by[1]
        numbers, of = kv[7], stride[7]
        numbers += tl.cast(batch, tl.int64) * of[0] + tl.cast(head, tl.int64) * of[1]
        for c in tl.static_range(OUTLIERS):
            value = tl.load(kept + place * by[2] + c * by[3], mask=old, other=0.0).to(tl.float32)
            rows = tl.where((col == tl.load(numbers + c * of[3]))[None, :], value[:, None], rows)

    recent = load_plain(kv, stride, 4 + PART, batch, head, 0, place - packed, late, D, WIDE)
    return tl.where(old[:, None], rows.to(recent.dtype), recent)


@triton.jit
def load_int8(
    kv, stride, PART: tl.constexpr, batch, head, base, row, mask, D: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    return _load(kv, stride, PART, batch, head, base, row, mask, D, WIDE, 8, 0)


@triton.jit
def load_int8_outliers(
    kv, stride, PART: tl.constexpr, batch, head, base, row, mask, D: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    return _load(kv, stride, PART, batch, head, base, row, mask, D, WIDE, 8, 4)


@triton.jit
def load_int4(
    kv, stride, PART: tl.constexpr, batch, head, base, row, mask, D: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    return _load(kv, stride, PART, batch, head, base, row, mask, D, WIDE, 4, 0)


@triton.jit
def load_int4_outliers(
    kv, stride, PART: tl.constexpr, batch, head, base, row, mask, D: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    return _load(kv, stride, PART, batch, head, base, row, mask, D, WIDE, 4, 4)
