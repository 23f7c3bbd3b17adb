from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Impls, LazyImpl, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.top_k,
    "eager": eager.top_k,
    "triton": LazyImpl(__package__, "top_k"),
}
MASS_IMPLS: Impls = {
    "reference": reference.by_mass,
    "eager": eager.by_mass,
    "triton": LazyImpl(__package__, "by_mass"),
}
THRESHOLD_IMPLS: Impls = {
    "reference": reference.by_threshold,
    "eager": eager.by_threshold,
    "triton": LazyImpl(__package__, "by_threshold"),
}


def top_k(scores: Tensor, k: int, *, order: str = "position", impl: str = "auto") -> Tensor:
    """Positions of the k highest scores along the last dimension of scores [..., N]; equal scores go to the
    lowest position. Infinities are ordinary scores; NaN is none, and what it is taken for is left open.

    order: "position" (ascending) or "score" (descending; equal scores by position). -> [..., min(k, N)]
    int64.
    On CUDA nothing waits for the device. Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"top_k needs k of at least 1; got {k}.")
    if order not in ("position", "score"):
        raise ValueError(f"top_k orders by 'position' or 'score'; got {order!r}.")
    return run("select", IMPLS, impl, scores, min(k, scores.shape[-1]), order=order)


def by_mass(
    probabilities: Tensor, mass: float, *, most: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The smallest set of entries of probabilities [..., N] (>= 0) whose sum reaches ``mass`` of the row's
    total.

    -> (indices [..., M] int64 ascending, counts [...] int32). The largest entries are taken first, equal ones
    at the lowest position; an entry of 0 never is, so a row without mass has count 0. Entries past the count
    repeat the first one (0 if there is none). M is the largest count, at least 1; learning it is the call's
    one wait for the device. With ``most`` M is min(most, N), nothing waits, and of a larger set the ``most``
    largest entries are kept.
    Sums are taken in float32 (float64 for float64 inputs). Raises ValueError for a mass outside (0, 1] and
    for most < 1.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"by_mass takes a share of the mass above 0, and at most 1; got {mass}.")
    most = _check_most("by_mass", probabilities, most)
    return run("select", MASS_IMPLS, impl, probabilities, mass=float(mass), most=most)


def by_threshold(
    scores: Tensor, threshold: float | Tensor, *, most: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Every entry of scores [..., N] that is at least ``threshold`` (a number, or a tensor that broadcasts to
    [...]); -inf never is.

    -> (indices [..., M] int64 ascending, counts [...] int32), padded, sized and bounded by ``most`` as in
    :func:`by_mass`: of a larger set the ``most`` highest entries are kept, equal ones at the lowest position.
    Scores and thresholds are compared in float32 (float64 for float64 scores). Raises ValueError for a
    threshold that does not broadcast and for most < 1.
    """
    most = _check_most("by_threshold", scores, most)
    rows = scores.shape[:-1]
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if isinstance(threshold, Tensor):
        try:
            limits = threshold.to(scores.device, wide).expand(rows)
        except RuntimeError:
            raise ValueError(
                f"by_threshold takes a threshold that broadcasts to {list(rows)}, the rows of scores "
                f"{list(scores.shape)}; got {list(threshold.shape)}."
            ) from None
    else:
        limits = torch.full(rows, threshold, dtype=wide, device=scores.device)
    return run("select", THRESHOLD_IMPLS, impl, scores, threshold=limits, most=most)


def _check_most(op: str, scores: Tensor, most: int | None) -> int | None:
    if most is not None and most < 1:
        raise ValueError(f"{op} keeps at least 1 entry; got most = {most}.")
    if scores.shape[-1] == 0:
        raise ValueError(f"{op} needs at least one entry per row; got {list(scores.shape)}.")
    return None if most is None else min(most, scores.shape[-1])
