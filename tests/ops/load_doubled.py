"""The load function of the toy format of doubled.py. Imported only by kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from farspan.attention.ops.load.plain import load_plain


@triton.jit
def load_doubled(
    kv, stride, PART: tl.constexpr, batch, head, base, row, mask, D: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """As ``load_plain``, of the parts doubled keys, factors and values."""
    if PART == 0:
        rows = load_plain(kv, stride, 0, batch, head, base, row, mask, D, WIDE)
        rows = rows * load_plain(kv, stride, 1, batch, head, base, row, mask, 1, 1)
    else:
        rows = load_plain(kv, stride, 2, batch, head, base, row, mask, D, WIDE)
    return rows
