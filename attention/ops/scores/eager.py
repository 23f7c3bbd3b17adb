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
    step = max(256, _TILE // (b * hkv * d))
    has_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    if k.dtype == wide or n <= step or has_grad:
        return torch.matmul(rows, k.to(wide).transpose(-1, -2)).view(b, hkv, h // hkv, t, n)
    rows, keys = rows.flatten(0, 1), rows.new_empty(b, hkv, step, d)
    out = rows.new_empty(b * hkv, rows.shape[1], n)
    for a in range(0, n, step):
        tile = k[:, :, a : a + step]
        widened = keys[:, :, : tile.shape[2]].copy_(tile).flatten(0, 1)
        torch.bmm(rows, widened.transpose(1, 2), out=out[..., a : a + step])
    return out.view(b, hkv, h // hkv, t, n)
