"""The definition of ``pool``, block by block."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(x: Tensor, block: int, *, mode: str, start: Tensor | None) -> Tensor:
    b, h, t, d = x.shape
    wide = x.dtype if mode != "mean" or x.dtype == torch.float64 else torch.float32
    blocks = -(-t // block)
    out = torch.zeros(b, h, blocks, d, dtype=x.dtype, device=x.device)
    for i in range(b):
        first = 0 if start is None else int(start[i])
        for j in range(-(-(t - first) // block)):
            piece = x[i, :, first + j * block : min(first + (j + 1) * block, t)].to(wide)
            pooled = piece.mean(1) if mode == "mean" else piece.amin(1) if mode == "min" else piece.amax(1)
            out[i, :, j] = pooled.to(x.dtype)
    return out
