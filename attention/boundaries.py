"""Chunks of any length: which token ends one, the chunk that each token is in, and sums over chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def within(ends: Tensor, longest: int, start: Tensor | None = None) -> Tensor:
    """``ends`` [B, T] (bool, the tokens that end a chunk) with more ends, so that no chunk has more than
    ``longest`` tokens: a longer one is cut into pieces of that size from its first token on.

    start [B]: the first valid position of each row, which begins a chunk; ends before it are ignored.
    """
    place = torch.arange(ends.shape[1], device=ends.device)
    first = torch.zeros_like(ends[:, :1], dtype=torch.long) if start is None else start[:, None]
    # the last end before each token; the padding counts as one chunk
    last = torch.where(ends & (place >= first), place, -1).cummax(1).values
    before = torch.maximum(pad(last[:, :-1], (1, 0), value=-1), first - 1)
    return (place >= first - 1) & ((ends & (place >= first)) | ((place - before) % longest == 0))


def chunk_numbers(ends: Tensor) -> Tensor:
    """The number of the chunk that each token is in, from 0: [..., T] int64. A token in ``ends`` [..., T]
    (bool) is the last of its chunk."""
    count = ends.long().cumsum(-1)
    return count - ends.long()


def chunk_sums(x: Tensor, numbers: Tensor, count: int) -> Tensor:
    """x [..., T] summed over each of ``count`` chunks: [..., count]. numbers: as ``chunk_numbers`` gives
    them, broadcast to x. Differentiable in x."""
    return x.new_zeros(*x.shape[:-1], count).scatter_add(-1, numbers.expand(x.shape), x)


def highest_apart(scores: Tensor, most: int, apart: int, threshold: float) -> Tensor:
    """Non-maximum suppression: the places of the ``most`` highest scores [..., S] above ``threshold`` of
    which no two are ``apart`` or fewer places from each other, taken greedily, the highest first and the
    earlier of two equal ones. -> [..., most] int64, ascending; S where there is no further one."""
    size = scores.shape[-1]
    place = torch.arange(size, device=scores.device)
    left, taken = scores, []
    for _ in range(most):
        value, best = left.max(-1, keepdim=True)
        taken.append(torch.where(value > threshold, best, size))
        left = left.masked_fill((place - best).abs() <= apart, -torch.inf)
    if not taken:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.long, device=scores.device)
    return torch.cat(taken, -1).sort(-1).values
