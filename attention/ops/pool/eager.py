"""``pool``: full blocks are one reduction over a view; only a ragged tail is treated apart."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(x: Tensor, block: int, *, mode: str, start: Tensor | None) -> Tensor:
    if start is None:
        return _pool(x, block, mode)
    b, h, t, d = x.shape
    out = x.new_zeros(b, h, -(-t // block), d)
    for i, first in enumerate(start.tolist()):
        if first < t:
            row = _pool(x[i : i + 1, :, first:], block, mode)
            out[i : i + 1, :, : row.shape[2]] = row
    return out


def _pool(x: Tensor, block: int, mode: str) -> Tensor:
    full = x.shape[2] // block
    parts = []
    if full:
        parts.append(_reduce(x[:, :, : full * block].unflatten(2, (full, block)), mode))
    if full * block < x.shape[2]:
        parts.append(_reduce(x[:, :, None, full * block :], mode))
    if not parts:
        return x.new_zeros(x.shape[0], x.shape[1], 0, x.shape[3])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _reduce(x: Tensor, mode: str) -> Tensor:
    if mode == "mean":
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.mean(3, dtype=wide).to(x.dtype)
    return x.amin(3) if mode == "min" else x.amax(3)
