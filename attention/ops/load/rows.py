"""Rows at known places, for kernels: what every load of rows ends with."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_at(place, mask, D: tl.constexpr, WIDE: tl.constexpr):
    """What stands at ``place`` [N, WIDE]; zeros where ``mask`` ([N], or None) is False and past column D."""
    col = tl.arange(0, WIDE)
    if mask is None and D == WIDE:
        rows = tl.load(place)
    elif mask is None:
        rows = tl.load(place, mask=(col < D)[None, :], other=0.0)
    elif D == WIDE:
        rows = tl.load(place, mask=mask[:, None], other=0.0)
    else:
        rows = tl.load(place, mask=mask[:, None] & (col < D)[None, :], other=0.0)
    return rows
