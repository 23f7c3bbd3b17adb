"""How Triton kernels load rows of keys and values in the plain format. Imported only by kernels.

A format of stored keys has one such function, with the same arguments. Kernels receive it as a constant and
load every key and value through it; the backward of ``block_sparse`` alone takes plain tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import load_at


@triton.jit
def load_plain(
    kv, stride, PART: tl.constexpr, batch, head, base, row, mask, D: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Rows base + row of one batch row and KV head as [N, WIDE]; zeros where ``mask`` is False and past D.

    kv: the pointers of ``KV.stored``; stride: their strides, four each. PART: 0 loads keys, 1 loads values;
    in this format it is the place in ``kv``. base: a scalar. row: [N], in int32 where row * stride is known
    to fit. mask: [N] bool, or None.
    """
    x, by = kv[PART], stride[PART]
    x += tl.cast(batch, tl.int64) * by[0] + tl.cast(head, tl.int64) * by[1] + tl.cast(base, tl.int64) * by[2]
    col = tl.arange(0, WIDE)
    place = x + row[:, None] * by[2] + col[None, :] * by[3]
    return load_at(place, mask, D, WIDE)
