"""Budgets, ``k`` tokens or a ``fraction`` of the visible keys, and taking the best entries within one."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require
from .errors import SpecError
from .keys import Keys, Peers
from .method import AttentionMethod
from .ops.select import top_k


def check_budget(method: AttentionMethod, k: int | None, fraction: float | None) -> None:
    """A budget is either ``k`` tokens or a ``fraction`` of the visible keys, and positive."""
    if (k is None) == (fraction is None):
        given = "neither" if k is None else "both"
        raise SpecError(
            f"{method.name} takes one budget, k=TOKENS or fraction=SHARE (the other none); got {given}."
        )
    require(method, k=(1, None), fraction=(1e-6, 1.0))


def budget_at(k: int | None, fraction: float | None, length: int) -> int:
    """Tokens that a decode query may read which sees ``length`` keys."""
    return k if k is not None else max(1, round((fraction or 0.0) * length))


def budget(k: int | None, fraction: float | None, keys: Keys) -> int | Tensor:
    """Tokens each decode query may read: an int where all agree, else [B, 1, Tq]; at least one, at most what
    is visible."""
    if k is not None or (keys.start is None and keys.tq == 1):
        return budget_at(k, fraction, keys.length)
    assert fraction is not None
    return (keys.seen().double() * fraction).round().long().clamp(min=1)


def max_budget(k: int | None, fraction: float | None, keys: Keys) -> int:
    """The largest ``budget`` of the call, known without asking the device."""
    return k if k is not None else int((fraction or 0.0) * keys.longest()) + 1


def select_topk(
    ranked: Tensor, size: int | Tensor, bound: int, peers: Peers | None = None
) -> tuple[Tensor, Tensor | None]:
    """The ``size`` best entries of scores [..., N] (-inf: not to be had), ascending, and how many of them
    count.

    size: one number, or one per row, [...], none above ``bound``, so that a device need not be asked for
    them. -> indices [..., M] int64, counts [...] int32 or None where all M count. Entries past the count
    repeat the first one. peers: as in group_scores; the cut is then made over everyone's entries, and the
    indices are positions.
    """
    if peers is not None:
        ranked, positions = peers.candidates(ranked, size if isinstance(size, int) else bound)
        chosen, counts = select_topk(ranked, size, bound)
        return positions.gather(-1, chosen), counts
    n = ranked.shape[-1]
    if isinstance(size, int):
        chosen = top_k(ranked, size)
        valid = ranked.gather(-1, chosen) > -torch.inf
        if ranked.device.type == "cpu" and bool(valid.all()):  # elsewhere asking would wait for the device
            return chosen, None
    else:
        on_cpu = ranked.device.type == "cpu"
        chosen = top_k(ranked, int(size.max()) if on_cpu else bound, order="score")
        within = torch.arange(chosen.shape[-1], device=ranked.device) < size[..., None]
        valid = within & (ranked.gather(-1, chosen) > -torch.inf)
    place = torch.where(valid, chosen, n).sort(-1).values
    return torch.where(place < n, place, place[..., :1]).clamp_(max=n - 1), valid.sum(-1).int()


def topk_positions(ranked: Tensor, k: int, peers: Peers | None = None) -> Tensor:
    """Positions [..., min(k, N)] of the k highest scores [..., N], best first; peers as in group_scores."""
    if peers is None:
        return top_k(ranked, k, order="score")
    ranked, positions = peers.candidates(ranked, k)
    return positions.gather(-1, top_k(ranked, k, order="score"))
