"""``top_k``: the library's selection, mended only where scores are tied at the cut."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int, *, order: str) -> Tensor:
    n = scores.shape[-1]
    if k == n:
        chosen = torch.arange(n, device=scores.device).expand(scores.shape)
    else:
        values, chosen = torch.topk(
            scores, k, dim=-1
        )  # the library leaves open which of equal scores it takes
        cut = values[..., -1:]
        if bool(((scores >= cut).sum(-1) > k).any()):
            above = scores > cut
            level = scores == cut
            room = k - above.sum(-1, keepdim=True)
            keep = above | (level & (level.cumsum(-1) <= room))
            chosen = keep.nonzero()[:, -1].view(*scores.shape[:-1], k)
    chosen = chosen.sort(-1).values
    if order == "position":
        return chosen
    rank = torch.sort(scores.gather(-1, chosen), dim=-1, descending=True, stable=True).indices
    return chosen.gather(-1, rank)
