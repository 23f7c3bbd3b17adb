"""``scores``: keys are widened tile by tile, in cache, while their products are taken."""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 1 << 20  # elements of k widened at a time, over all heads of a row


def scores(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    b, h, t, d = q.shape
    hkv, n = k.shape[1], k.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (q.to(wide) * scale).reshape(b, hkv, (h // hkv) * t, d)
    if k.dtype == wide:
        return torch.matmul(rows, k.transpose(-1, -2)).view(b, hkv, h // hkv, t, n)
    step = max(256, _TILE // (b * hkv * d))
    if n <= step:
        return torch.matmul(rows, k.to(wide).transpose(-1, -2)).view(b, hkv, h // hkv, t, n)
    out = torch.empty(b, hkv, rows.shape[2], n, dtype=wide, device=q.device)
    for a in range(0, n, step):
        out[..., a : a + step] = torch.matmul(rows, k[:, :, a : a + step].to(wide).transpose(-1, -2))
    return out.view(b, hkv, h // hkv, t, n)
