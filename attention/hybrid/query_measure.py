"""How much a query differs among the keys, measured on some of them (Informer, arXiv 2012.07436)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.autocast import without_autocast
from .tokens import rows


@without_autocast
def query_measure(q: Tensor, k: Tensor, seen: Tensor, factor: int, scale: float) -> Tensor:
    """M = max_j s_j - sum_j s_j / seen, [B, H, T] in float32 or wider, s being the scaled scores of q [B,
    H, T, D] and of ``sampled`` keys that are spread evenly over the first ``seen`` [B, T] ones of k [B,
    Hkv, n, D]."""
    wide, seen = torch.promote_types(q.dtype, torch.float32), seen.clamp(min=1)
    number = sampled(seen, factor)[..., None]
    i = torch.arange(int(number.max()), device=q.device)
    at = (i * seen[..., None] // number).clamp(max=k.shape[2] - 1)  # [B, T, U]
    some = rows(k.transpose(1, 2), at.flatten(1)).unflatten(1, at.shape[1:]).to(wide)  # [B, T, U, Hkv, D]
    q = q.to(wide).unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bkgtd,btukd->bkgtu", q, some).flatten(1, 2) * scale
    none = (i >= number)[:, None]
    total = scores.masked_fill(none, 0).sum(3) / seen[:, None]
    return scores.masked_fill(none, -torch.inf).amax(3) - total


def sampled(n: Tensor, factor: int) -> Tensor:
    """u(n) = factor * ceil(ln n), at least 1 and at most n, of whole numbers n."""
    return torch.minimum((factor * n.clamp(min=1).double().log().ceil().long()).clamp(min=1), n.clamp(min=1))
