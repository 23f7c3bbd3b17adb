"""ACT (2406.15765) written from its definition for one row and one head, in float64, as whole matrices.

Nothing of the package is used here. The queries of the call are the last ones of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(q: Tensor, k: Tensor, scale: float, softcap: float | None, read: Tensor) -> Tensor:
    """q [n, D], k [T, D], read [n, T] bool -> the attention matrix [n, T] over what is read."""
    logits = q.double() @ k.double().T * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = torch.where(read, (logits - logits.max()).exp(), 0)
    return weights / weights.sum(1, keepdim=True)


def column_means(matrix: Tensor) -> list[float]:
    """Of each key, over the queries of the call at its position or later."""
    n, length = matrix.shape
    return [float(matrix[max(0, t - (length - n)) :, t].mean()) for t in range(length)]


def sinks(matrix: Tensor, threshold: float) -> set[int]:
    """The keys that draw more than ``threshold`` on average, token 0 excepted."""
    return {t for t, mean in enumerate(column_means(matrix)) if t > 0 and mean > threshold}


def calibrated(matrix: Tensor, of: set[int], beta: float) -> Tensor:
    """The attention matrix in which the sinks ``of`` keep beta of theirs, and the others share what is freed
    as they share the rest; a row of sinks alone stays."""
    result, few = matrix.clone(), sorted(of)
    others = [t for t in range(matrix.shape[1]) if t not in of]
    for i, row in enumerate(matrix):
        freed, rest = (1 - beta) * row[few].sum(), row[others].sum()
        if rest > 0:
            result[i, few] = beta * row[few]
            result[i, others] = row[others] + freed * row[others] / rest
    return result
