"""The definition of ``scores``."""

from __future__ import annotations

import torch
from torch import Tensor


def scores(q: Tensor, k: Tensor, *, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, h, t, d = q.shape
    grouped = q.to(wide).reshape(b, k.shape[1], h // k.shape[1], t, d)
    return grouped @ k.to(wide)[:, :, None].transpose(-1, -2) * scale
