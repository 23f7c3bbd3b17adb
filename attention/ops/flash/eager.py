"""``flash`` on torch's own kernels: causal squares and past rectangles, merged; padding by slicing each
row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv import KV
from ...partial import Partial, merge
from ...softmax import Softmax
from .. import kernel
from ..padding import by_row


def flash(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int | None,
    start: Tensor | None,
) -> Partial:
    if start is None:
        return _rows(q, kv, softmax, window)
    return by_row(q, kv, start, lambda _, q, kv: _rows(q, kv, softmax, window))


def _rows(q: Tensor, kv: KV, softmax: Softmax, window: int | None) -> Partial:
    tq, tk = q.shape[2], kv.length
    if window is not None and window < tk:
        return _banded(q, kv, softmax, window)
    past = tk - tq
    square = _square(q, kv[:, :, past:], softmax)
    if past == 0:
        return square
    before = kernel.attend(kernel.fold_groups(q, kv.num_kv_heads), kv[:, :, :past], softmax)
    return merge(kernel.unfold_groups(before, q.shape[1], tq), square)


def _square(q: Tensor, kv: KV, softmax: Softmax) -> Partial:
    """Causal self-attention of equal lengths. KV heads are shared by stride-0 views, one batch entry per KV
    head."""
    b, h, t, d = q.shape
    hkv, group, kv = kv.num_kv_heads, q.shape[1] // kv.num_kv_heads, kv.on_device()
    if q.device.type == "cuda" and (part := kernel.causal_of_groups(q, kv, softmax)) is not None:
        return part
    if group == 1:
        return kernel.attend(q, kv, softmax, causal=True)
    folded = q.reshape(b, hkv, group, t, d)
    kv = kv.map(lambda x: x[:, :, None].expand(-1, -1, group, -1, -1))  # no copy
    parts = [kernel.attend(folded[i], kv[i], softmax, causal=True) for i in range(b)]
    if b == 1:
        return Partial(parts[0].out.reshape(b, h, t, -1), parts[0].lse.reshape(b, h, t))
    return Partial(
        torch.stack([p.out for p in parts]).reshape(b, h, t, -1),
        torch.stack([p.lse for p in parts]).reshape(b, h, t),
    )


def _banded(q: Tensor, kv: KV, softmax: Softmax, window: int) -> Partial:
    """Sliding window in O(Tq * window): each tile of queries meets only the keys that some of its rows can
    see.

    window = 3:      k 0 1 2 3 4 5
                  q    x . . . . .
                       x x . . . .
                       x x x . . .
                       . x x x . .
                       . . x x x .
    """
    h, tq, tk, hkv = q.shape[1], q.shape[2], kv.length, kv.num_kv_heads
    past, tile = tk - tq, max(64, min(window, 1024))
    parts = []
    for a in range(0, tq, tile):
        b = min(a + tile, tq)
        lo, hi = max(0, past + a - window + 1), past + b
        rows = torch.arange(past + a, past + b, device=q.device)[:, None]
        cols = torch.arange(lo, hi, device=q.device)[None]
        band = ((cols <= rows) & (cols > rows - window)).repeat(h // hkv, 1)  # [G * tile, keys]
        folded = kernel.fold_groups(q[:, :, a:b], hkv)
        part = kernel.attend(folded, kv[:, :, lo:hi], softmax, mask=band[None, None])
        parts.append(kernel.unfold_groups(part, h, b - a))
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))
