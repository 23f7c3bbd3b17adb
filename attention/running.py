"""The highest scores among the first t entries of a sequence, for every t at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def kept_until(scores: Tensor, w: int) -> Tensor:
    """How long each entry of scores [..., N] is among the ``w`` highest so far: entry j is one of the w
    highest of the entries 0 .. t for t = j .. until - 1, and for no t where until is at most j. -> until
    [..., N] int64, N where it still is at the end. Of equal scores the later is higher. O(N log N)."""
    n = scores.shape[-1]
    order = scores.contiguous().argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(n, device=scores.device).expand_as(order))
    cut = _kth_so_far(rank, w).masked_fill_(torch.arange(1, n + 1, device=scores.device) < w, -1)
    return torch.searchsorted(cut, rank, right=True)  # the cut only rises


def _kth_so_far(rank: Tensor, k: int) -> Tensor:
    """The k-th largest of the entries 0 .. t of ``rank`` [..., N], a permutation of 0 .. N - 1 in each row;
    the smallest where there are fewer. It is found bit by bit, the highest first (a wavelet matrix): at each
    bit the entries are parted into those without it and those with it, and the part of each t is followed."""
    n = rank.shape[-1]
    seen = torch.arange(1, n + 1, device=rank.device)
    low, high, left = torch.zeros_like(rank), seen.expand_as(rank), seen.clamp(max=k).expand_as(rank)
    place, found = seen - 1, torch.zeros_like(rank)
    for bit in reversed(range(max(1, (n - 1).bit_length()))):
        ones = rank >> bit & 1
        before = pad(ones.cumsum(-1), (1, 0))  # [..., N + 1] ones in front of a place
        a, b = before.gather(-1, low), before.gather(-1, high)
        has_bit = b - a >= left
        found |= has_bit.long() << bit
        left = torch.where(has_bit, left, left - (b - a))
        zeros = n - before[..., -1:]
        low, high = torch.where(has_bit, zeros + a, low - a), torch.where(has_bit, zeros + b, high - b)
        target = torch.where(ones.bool(), zeros + before[..., :-1], place - before[..., :-1])
        rank = torch.empty_like(rank).scatter_(-1, target, rank)
    return found
