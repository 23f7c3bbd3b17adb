"""``pool``: full blocks are one reduction over a view; only a ragged tail is treated apart.

``pool_segments``: torch's reduction over segments given by their bounds, for any lengths at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool(x: Tensor, block: int, *, modes: tuple[str, ...], start: Tensor | None) -> Tensor:
    if start is None:
        return _pool(x, block, modes)
    b, h, t, d = x.shape
    out = x.new_zeros(b, h, -(-t // block), len(modes) * d)
    for i, first in enumerate(start.tolist()):
        if first < t:
            row = _pool(x[i : i + 1, :, first:], block, modes)
            out[i : i + 1, :, : row.shape[2]] = row
    return out


def _pool(x: Tensor, block: int, modes: tuple[str, ...]) -> Tensor:
    full = x.shape[2] // block
    parts = []
    if full:
        parts.append(_reduce(x[:, :, : full * block].unflatten(2, (full, block)), modes))
    if full * block < x.shape[2]:
        parts.append(_reduce(x[:, :, None, full * block :], modes))
    if not parts:
        return x.new_zeros(x.shape[0], x.shape[1], 0, len(modes) * x.shape[3])
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _reduce(x: Tensor, modes: tuple[str, ...]) -> Tensor:
    """x [B, Hkv, N, block, D] -> [B, Hkv, N, len(modes) * D]."""
    parts = []
    for mode in modes:
        if mode == "min":
            parts.append(x.amin(3))
        elif mode == "max":
            parts.append(x.amax(3))
        else:
            mean = x.mean(3, dtype=_wide(x))
            parts.append((mean * x.shape[3] ** 0.5 if mode == "length_normalised" else mean).to(x.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def pool_segments(x: Tensor, bounds: Tensor, *, modes: tuple[str, ...]) -> Tensor:
    offsets = bounds.long().contiguous()
    length = offsets.diff(dim=-1)[..., None]  # [B, Hkv, S, 1]
    wide = x.contiguous().to(_wide(x))
    parts = []
    for mode in modes:
        how = "mean" if mode == "length_normalised" else mode
        # unsafe: without the checks of what the bounds hold, which would wait for the device
        part = torch.segment_reduce(wide, how, offsets=offsets, axis=2, unsafe=True)
        if mode == "length_normalised":
            part = part * length.to(part.dtype).sqrt()
        parts.append(part.masked_fill(length <= 0, 0).to(x.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
