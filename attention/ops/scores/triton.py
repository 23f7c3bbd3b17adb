"""``scores`` in Triton: a tile of float32 logits per program, products accumulated over pieces of D.

The G query heads of a KV head times the T queries are the rows, in the order of the output [G, T]: for one
new query that is a tile of G rows, padded to 16, and K is what is read; for thousands of pooled queries it is
an ordinary matrix product whose float32 output is what costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

_ANY = 1 << 16  # D is taken piece by piece: summaries may be several heads wide


def unsupported(q: Tensor, k: Tensor, *, scale: float) -> list[str]:
    return launch.cannot_read(q, k, largest=_ANY) + launch.no_gradient(q, k)


def scores(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    b, h, t, d = q.shape
    hkv, n = k.shape[1], k.shape[2]
    group = h // hkv
    out = torch.empty(b, hkv, group, t, n, dtype=torch.float32, device=q.device)
    # Few rows: K passes by once, and wide tiles keep many of its bytes in flight. Many: a square product.
    few = group * t <= 32
    rows = max(16, min(64 if q.dtype == torch.float32 else 128, triton.next_power_of_2(group * t)))
    cols = 64 if q.dtype == torch.float32 else 128
    piece = min(launch.wide(d), 32 if q.dtype == torch.float32 else 128 if few else 64)
    _scores[(triton.cdiv(n, cols), triton.cdiv(group * t, rows), b * hkv)](
        q, k, out, *q.stride(), *k.stride(), hkv, t, n, scale,
        GROUP=group, D=d, PIECE=piece, ROWS=rows, COLS=cols, num_warps=4 if rows < 128 else 8,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["t"])
def _scores(
    q, k, out, sqb, sqh, sqt, sqd, skb, skh, skn, skd, hkv, t, n, scale,
    GROUP: tl.constexpr, D: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # (head of the group, query)
    batch, head = (tl.program_id(2) // hkv).to(tl.int64), (tl.program_id(2) % hkv).to(tl.int64)
    here, there = (row < GROUP * t)[:, None], (col < n)[None, :]
    q += batch * sqb + (head * GROUP + row // t)[:, None] * sqh + (row % t).to(tl.int64)[:, None] * sqt
    k += batch * skb + head * skh + col.to(tl.int64)[None, :] * skn
    d = tl.arange(0, PIECE)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for begin in range(0, D, PIECE):
        at = (begin + d).to(tl.int64)
        queries = tl.load(q + at[None, :] * sqd, mask=here & (at < D)[None, :], other=0.0)
        keys = tl.load(k + at[:, None] * skd, mask=there & (at < D)[:, None], other=0.0)
        acc = tl.dot(queries, keys, acc, input_precision="ieee")
    place = (tl.program_id(2).to(tl.int64) * (GROUP * t) + row)[:, None] * n + col[None, :]
    tl.store(out + place, acc * scale, mask=here & there)
