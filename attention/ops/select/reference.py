"""The definition of ``top_k``: a stable sort."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int, *, order: str) -> Tensor:
    ranked = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    return ranked if order == "score" else ranked.sort(-1).values
