"""The definition of ``pool`` and ``pool_segments``, piece by piece."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def pool(x: Tensor, block: int, *, modes: tuple[str, ...], start: Tensor | None) -> Tensor:
    b, h, t, d = x.shape
    out = torch.zeros(b, h, -(-t // block), len(modes) * d, dtype=x.dtype, device=x.device)
    for i in range(b):
        first = 0 if start is None else int(start[i])
        for j in range(-(-(t - first) // block)):
            piece = x[i, :, first + j * block : min(first + (j + 1) * block, t)]
            out[i, :, j] = torch.cat([_pooled(piece, mode) for mode in modes], -1)
    return out


def pool_segments(x: Tensor, bounds: Tensor, *, modes: tuple[str, ...]) -> Tensor:
    b, h, _, d = x.shape
    out = torch.zeros(b, h, bounds.shape[-1] - 1, len(modes) * d, dtype=x.dtype, device=x.device)
    for i in range(b):
        for j in range(h):
            ends = bounds[i, j].tolist()
            for s, (lo, hi) in enumerate(pairwise(ends)):
                if lo < hi:
                    piece = x[i, j : j + 1, lo:hi]
                    out[i, j, s] = torch.cat([_pooled(piece, mode) for mode in modes], -1)[0]
    return out


def _pooled(piece: Tensor, mode: str) -> Tensor:
    """piece [Hkv, n, D] -> [Hkv, D]."""
    if mode in ("min", "max"):
        return piece.amin(1) if mode == "min" else piece.amax(1)
    mean = piece.to(torch.float64 if piece.dtype == torch.float64 else torch.float32).mean(1)
    return (mean * piece.shape[1] ** 0.5 if mode == "length_normalised" else mean).to(piece.dtype)
