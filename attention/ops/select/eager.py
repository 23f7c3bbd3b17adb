"""Selection by the library's sorts, mended where scores are tied at the cut. On CUDA nothing waits for the
device, except to learn how long the lists of ``by_mass`` and ``by_threshold`` are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..sums import running_sum

_LAST = 2**62  # beyond every position
_LONG = 8192  # scores of a row from which on not all of them are ranked


def top_k(scores: Tensor, k: int, *, order: str) -> Tensor:
    chosen = _top_k(scores, k)
    if order == "position":
        return chosen
    rank = torch.sort(scores.gather(-1, chosen), dim=-1, descending=True, stable=True).indices
    return chosen.gather(-1, rank)


def _top_k(scores: Tensor, k: int) -> Tensor:
    if k == scores.shape[-1]:
        return torch.arange(k, device=scores.device).expand(scores.shape).contiguous()
    values, chosen = _largest(scores, k)
    cut = values[..., -1:]
    # On the CPU asking whether there are ties is cheap, and mending them is not. On CUDA asking is a wait.
    on_cpu = scores.device.type == "cpu"
    if on_cpu and int((scores >= cut).count_nonzero()) == values.numel():
        return chosen.sort(-1).values
    above = scores > cut
    level = scores == cut
    keep = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return _positions(keep, k)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``torch.topk``, which leaves open which of equal scores it takes.

    The library's time on the CPU grows with the number of scores, N. There long rows are dealt out to
    L = sqrt(N k) lanes. The k lanes with the highest maxima hold k largest scores, since no score of another
    lane is above any of those maxima. So L maxima are ranked, and the N k / L scores of k lanes.
    """
    n = scores.shape[-1]
    if n < max(_LONG, 16 * k) or scores.device.type != "cpu":
        return torch.topk(scores, k, dim=-1)
    size = math.isqrt(n // k)  # of a lane
    lanes = n // size
    maxima = scores[..., : lanes * size].unflatten(-1, (size, lanes)).amax(-2)
    best = torch.topk(maxima, k, dim=-1, sorted=False).indices
    dealt = (best[..., None, :] + torch.arange(0, lanes * size, lanes)[:, None]).flatten(-2)
    rest = torch.arange(lanes * size, n).expand(*best.shape[:-1], -1)  # of no lane
    candidates = torch.cat([dealt, rest], -1)
    values, chosen = torch.topk(scores.gather(-1, candidates), k, dim=-1)
    return values, candidates.gather(-1, chosen)


def by_mass(probabilities: Tensor, *, mass: float, most: int | None) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if probabilities.dtype == torch.float64 else torch.float32
    values, ranked = torch.sort(probabilities.to(wide), dim=-1, descending=True, stable=True)
    reached = running_sum(values)
    # An entry is taken while those before it fall short of the goal.
    short = torch.zeros_like(reached, dtype=torch.bool)
    short[..., 0] = True
    short[..., 1:] = reached[..., :-1] < mass * reached[..., -1:]
    return _front(ranked, (short & (values > 0)).sum(-1), most)


def by_threshold(scores: Tensor, *, threshold: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    passes = (scores.to(threshold.dtype) >= threshold[..., None]) & (scores > -torch.inf)
    if most is None:
        counts = passes.sum(-1)
        return _padded(_positions(passes, _longest(counts)), counts)
    ranked = top_k(scores, most, order="score")
    return _front(ranked, passes.gather(-1, ranked).sum(-1), most)


def _front(ranked: Tensor, counts: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """The first ``counts`` of each row of positions ranked [..., N], put in order of position."""
    if most is not None:
        counts = counts.clamp(max=most)
    size = _longest(counts) if most is None else most
    within = torch.arange(size, device=ranked.device) < counts[..., None]
    place = torch.where(within, ranked[..., :size], _LAST).sort(-1).values
    return _padded(place, counts)


def _longest(counts: Tensor) -> int:
    return max(1, int(counts.max())) if counts.numel() else 1


def _padded(place: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Entries past the count repeat the first one, or are 0."""
    first = torch.where(counts[..., None] > 0, place[..., :1], 0)
    within = torch.arange(place.shape[-1], device=place.device) < counts[..., None]
    return torch.where(within, place, first), counts.int()


def _positions(keep: Tensor, size: int) -> Tensor:
    """Where keep [..., N] is True, ascending -> [..., size]; a row with fewer is filled up with 0."""
    slot = torch.where(keep, keep.cumsum(-1) - 1, size)  # slot ``size`` collects what is not kept
    out = torch.zeros(*keep.shape[:-1], size + 1, dtype=torch.int64, device=keep.device)
    position = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
    return out.scatter_(-1, slot, position)[..., :size]
