"""``flash`` on torch's own kernels: causal squares and past rectangles, merged; padding by slicing each
row."""

from __future__ import annotations

import torch
from torch import Tensor

from ...partial import Partial, merge
from .. import kernel
from ..padding import by_row


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    start: Tensor | None,
) -> Partial:
    if start is None:
        return _rows(q, k, v, scale, window, softcap)
    return by_row(q, k, v, start, lambda _, q, k, v: _rows(q, k, v, scale, window, softcap))


def _rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
) -> Partial:
    tq, tk = q.shape[2], k.shape[2]
    if window is not None and window < tk:
        return _banded(q, k, v, scale, window, softcap)
    past = tk - tq
    square = _square(q, k[:, :, past:], v[:, :, past:], scale, softcap)
    if past == 0:
        return square
    hkv = k.shape[1]
    before = kernel.attend(
        kernel.fold_groups(q, hkv), k[:, :, :past], v[:, :, :past], scale=scale, softcap=softcap
    )
    return merge(kernel.unfold_groups(before, q.shape[1], tq), square)


def _square(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> Partial:
    """Causal self-attention of equal lengths. KV heads are shared by stride-0 views, one batch entry per KV
    head."""
    b, h, t, d = q.shape
    hkv, group = k.shape[1], q.shape[1] // k.shape[1]
    if group == 1:
        return kernel.attend(q, k, v, scale=scale, causal=True, softcap=softcap)
    folded = q.reshape(b, hkv, group, t, d)
    parts = [  # k and v of one batch row: [Hkv, 1 -> G, T, D] without a copy
        kernel.attend(
            folded[i], _share(k[i], group), _share(v[i], group), scale=scale, causal=True, softcap=softcap
        )
        for i in range(b)
    ]
    if b == 1:
        return Partial(parts[0].out.reshape(b, h, t, -1), parts[0].lse.reshape(b, h, t))
    return Partial(
        torch.stack([p.out for p in parts]).reshape(b, h, t, -1),
        torch.stack([p.lse for p in parts]).reshape(b, h, t),
    )


def _share(x: Tensor, group: int) -> Tensor:
    return x[:, None].expand(-1, group, -1, -1)


def _banded(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float | None) -> Partial:
    """Sliding window in O(Tq * window): each tile of queries meets only the keys that some of its rows can
    see.

    window = 3:      k 0 1 2 3 4 5
                  q    x . . . . .
                       x x . . . .
                       x x x . . .
                       . x x x . .
                       . . x x x .
    """
    h, tq, tk, hkv = q.shape[1], q.shape[2], k.shape[2], k.shape[1]
    past, tile = tk - tq, max(64, min(window, 1024))
    parts = []
    for a in range(0, tq, tile):
        b = min(a + tile, tq)
        lo, hi = max(0, past + a - window + 1), past + b
        rows = torch.arange(past + a, past + b, device=q.device)[:, None]
        cols = torch.arange(lo, hi, device=q.device)[None]
        band = ((cols <= rows) & (cols > rows - window)).repeat(h // hkv, 1)  # [G * tile, keys]
        folded = kernel.fold_groups(q[:, :, a:b], hkv)
        part = kernel.attend(
            folded, k[:, :, lo:hi], v[:, :, lo:hi], scale=scale, mask=band[None, None], softcap=softcap
        )
        parts.append(kernel.unfold_groups(part, h, b - a))
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))
