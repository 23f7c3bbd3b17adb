"""Paired differences and their 95 % intervals, to compare two methods on the same prompts.

Every method answers the same prompts, so a method is compared with dense sample by sample. The spread between
prompts, which is most of the spread, cancels in the difference.

All intervals here are Student t intervals. For skewed differences (ΔNLL of one task on 6 to 10 prompts)
they contain the true value nine times in ten rather than nineteen times in twenty.

Differences of a score have bounds, and most of them are zero. A plain t interval of few prompts then exceeds
the bounds, or has no width. So the interval of a bounded difference counts two additional
pseudo-observations, one at each bound (Bonett and Price 2012, "Adjusted Wald confidence interval for a
difference of binomial proportions based on paired data"), and ends at the bounds. If all of n differences are
zero, its half width is about that of the rule of three, 3 / n; a bootstrap interval has no width there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FEWEST = 6
"""The least number of pairs for an interval. With fewer, even differences that all have one sign are no
evidence at 95 %: 2 / 2**5 is more than 0.05."""
TOO_FEW, NO_SPREAD = "too few", "no spread"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval.

    low, high: None if there is no interval. `reason` then says why: "too few" (fewer than `FEWEST` pairs) or
    "no spread" (all differences are equal, so their spread is unknown).
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    reason: str | None = None

    def to_dict(self) -> dict[str, float | int | str | None]:
        return asdict(self)


def paired_interval(
    differences: Sequence[float], *, bound: float | None = None, confidence: float = 0.95
) -> Interval | None:
    """The mean of paired differences with its interval; None without pairs.

    bound: every difference lies within -bound .. bound. Without a bound (None) the interval is
    `mean ± t(n-1) · s / sqrt(n)`.
    """
    return stratified_interval([differences], bound=bound, confidence=confidence)


def stratified_interval(
    groups: Iterable[Sequence[float]], *, bound: float | None = None, confidence: float = 0.95
) -> Interval | None:
    """The mean of the groups' means with its interval: the overall figure of a table whose cells are tasks.
    None without pairs.

    The groups (RULER's tasks) are fixed, not drawn, so only the spread within each group counts. The variance
    of the mean is `sum(s_g² / n_g) / G²`, with Welch-Satterthwaite degrees of freedom. One or two samples say
    little about their spread; for them it is at least that of all samples around their common mean.
    bound: as for `paired_interval`; the two pseudo-observations are divided among the groups (as in
    Price and Bonett 2004, "An improved confidence interval for a linear function of binomial proportions").
    """
    kept = [values for values in (_finite(group) for group in groups) if values]
    if not kept:
        return None
    n = sum(len(values) for values in kept)
    mean = sum(sum(values) / len(values) for values in kept) / len(kept)
    if n < FEWEST:
        return Interval(mean=mean, low=None, high=None, n=n, reason=TOO_FEW)
    share = 0.0 if bound is None else 1 / len(kept)
    centres, parts = [], []  # parts: (variance of the mean of one or several groups, its degrees of freedom)
    small = []  # (variance, size) of groups of one or two
    for values in kept:
        centre, variance, size = _moments(values, bound, share)
        centres.append(centre)
        if len(values) > 2:
            parts.append((variance / size, size - 1))
        else:
            small.append((variance, size))
    if small:
        _, common, n_all = _moments([x for values in kept for x in values], bound, share * len(kept))
        parts.append((sum(max(variance, common) / size for variance, size in small), n_all - 1))
    total = sum(part for part, _ in parts)
    if total == 0:
        return Interval(mean=mean, low=None, high=None, n=n, reason=NO_SPREAD)
    df = total**2 / sum(part**2 / freedom for part, freedom in parts)
    centre, half = sum(centres) / len(kept), _t_quantile(confidence, df) * math.sqrt(total) / len(kept)
    limit = math.inf if bound is None else bound
    return Interval(mean=mean, low=max(centre - half, -limit), high=min(centre + half, limit), n=n)


def paired(values: Mapping[str, float | None], baseline: Mapping[str, float | None]) -> dict[str, float]:
    """`values - baseline` for every sample key that both have. None and non-finite entries are left out."""
    out: dict[str, float] = {}
    for key, value in values.items():
        base = baseline.get(key)
        if value is not None and base is not None and math.isfinite(value - base):
            out[key] = value - base
    return out


def strata(values: Iterable[tuple[Mapping[str, Any], float]]) -> list[list[float]]:
    """The values of rows as groups of independent ones: a group for each task and length.

    The turns of a conversation ask about one context, so they are not independent: such rows name their
    "conversation", and its mean counts as one value.
    """
    groups: dict[Any, dict[str, list[float]]] = {}
    for row, value in values:
        talk = row.get("conversation")
        group = (row["task"], row["length"]) if talk is None else talk.rpartition("/")[0]
        groups.setdefault(group, {}).setdefault(talk or row["key"], []).append(value)
    return [[sum(found) / len(found) for found in group.values()] for group in groups.values()]


def _finite(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]


def _moments(values: Sequence[float], bound: float | None, share: float) -> tuple[float, float, float]:
    """Mean, variance and number of the values with pseudo-observations of weight `share` at either bound."""
    size = len(values) + 2 * share
    mean = sum(values) / size
    squares = sum((value - mean) ** 2 for value in values)
    if bound is not None:
        squares += share * ((bound - mean) ** 2 + (bound + mean) ** 2)
    return mean, squares / max(size - 1, 1), size


def _t_quantile(confidence: float, df: float) -> float:
    from scipy.stats import t  # type: ignore[import-untyped]  # late: it takes most of a second

    return float(t.ppf(0.5 + confidence / 2, df))
