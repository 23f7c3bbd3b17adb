"""Budgets of ``k`` tokens or a ``fraction`` of the visible keys, and the highest scores within a budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require
from .errors import SpecError
from .keys import Keys, Peers
from .method import AttentionMethod
from .ops.select import top_k
from .selection.ragged import counted_first


def check_budget(method: AttentionMethod, k: int | None, fraction: float | None) -> None:
    """Raise SpecError unless exactly one of ``k`` tokens and a ``fraction`` of the visible keys is given, and
    is positive."""
    if (k is None) == (fraction is None):
        given = "neither" if k is None else "both"
        raise SpecError(
            f"{method.name} takes one budget, k=TOKENS or fraction=SHARE (the other none); got {given}."
        )
    require(method, k=(1, None), fraction=(1e-6, 1.0))


def budget_at(k: int | None, fraction: float | None, length: int) -> int:
    """The number of tokens that a decode query may read if it sees ``length`` keys."""
    return k if k is not None else max(1, round((fraction or 0.0) * length))


def budget(k: int | None, fraction: float | None, keys: Keys) -> int | Tensor:
    """The number of tokens that each decode query may read, at least one: an int where it is the same for
    all, else [B, 1, Tq]."""
    if k is not None or (keys.start is None and keys.tq == 1):
        return budget_at(k, fraction, keys.length)
    assert fraction is not None
    return (keys.seen().double() * fraction).round().long().clamp(min=1)


def max_budget(k: int | None, fraction: float | None, keys: Keys) -> int:
    """An upper bound of ``budget`` for all queries of the call, known without waiting for the device."""
    return k if k is not None else int((fraction or 0.0) * keys.longest()) + 1


def select_topk(
    ranked: Tensor, size: int | Tensor, max_size: int, peers: Peers | None = None, *, every: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The ``size`` highest scores of ranked [..., N] (-inf: not a candidate), in ascending order. every: no
    row has fewer candidates than its ``size``, as the host knows.

    size: one number, or one per row, [...]. max_size: none is above it; known on the host, so that nothing
    waits for the device. -> indices [..., M] int64, counts [...] int32, or None where all M count and
    ``size`` is one number; entries past the count repeat a counted one. peers: as in group_scores; the
    selection is then made among the keys of all ranks, and the indices are positions.
    """
    if peers is not None:
        ranked, positions = peers.candidates(ranked, size if isinstance(size, int) else max_size)
        chosen, counts = select_topk(ranked, size, max_size)
        return positions.gather(-1, chosen), counts
    if isinstance(size, int):
        chosen = top_k(ranked, size)
        if every:
            return chosen, None
        return counted_first(chosen, ranked.gather(-1, chosen) > -torch.inf)
    on_cpu = ranked.device.type == "cpu"
    chosen = top_k(ranked, int(size.max()) if on_cpu else max_size, order="score")
    within = torch.arange(chosen.shape[-1], device=ranked.device) < size[..., None]
    valid = within & (ranked.gather(-1, chosen) > -torch.inf)
    tokens, counts = counted_first(chosen, valid, ascending=True)
    if counts is None:
        counts = torch.full(tokens.shape[:-1], tokens.shape[-1], dtype=torch.int, device=tokens.device)
    return tokens, counts


def topk_positions(ranked: Tensor, k: int, peers: Peers | None = None) -> Tensor:
    """Positions [..., min(k, N)] of the k highest scores of ranked [..., N], highest first; peers as in
    group_scores."""
    if peers is None:
        return top_k(ranked, k, order="score")
    ranked, positions = peers.candidates(ranked, k)
    return positions.gather(-1, top_k(ranked, k, order="score"))
