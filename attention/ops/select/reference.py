"""The definitions: a stable sort, and counting down it."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int, *, order: str) -> Tensor:
    ranked = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]
    return ranked if order == "score" else ranked.sort(-1).values


def by_mass(probabilities: Tensor, *, mass: float, most: int | None) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    rows = probabilities.to(wide).reshape(-1, probabilities.shape[-1])
    kept = []
    for row in rows:
        values, ranked = torch.sort(row, descending=True, stable=True)
        reached = values.cumsum(0)
        taken = 0
        while (
            taken < len(row) and values[taken] > 0 and (taken == 0 or reached[taken - 1] < mass * reached[-1])
        ):
            taken += 1
        kept.append(ranked[: taken if most is None else min(taken, most)])
    return _lists(kept, probabilities, most)


def by_threshold(scores: Tensor, *, threshold: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    rows = scores.to(threshold.dtype).reshape(-1, scores.shape[-1])
    kept = []
    for row, limit in zip(rows, threshold.reshape(-1), strict=True):
        values, ranked = torch.sort(row, descending=True, stable=True)
        kept.append(ranked[(values >= limit) & (values > -torch.inf)][:most])
    return _lists(kept, scores, most)


def _lists(kept: list[Tensor], scores: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """One list of positions per row, in any order, as (indices, counts)."""
    size = max([1, *map(len, kept)]) if most is None else most
    indices = torch.zeros(len(kept), size, dtype=torch.int64, device=scores.device)
    for row, positions in zip(indices, kept, strict=True):
        if len(positions):
            row.fill_(int(positions.min()))
            row[: len(positions)] = positions.sort().values
    counts = torch.tensor([len(positions) for positions in kept], dtype=torch.int32, device=scores.device)
    return indices.view(*scores.shape[:-1], size), counts.view(scores.shape[:-1])
