"""Paired differences and their 95 % intervals: how two methods are told apart on the same prompts.

Every method answers the same prompts, so a method is compared with dense sample by sample: the spread between
prompts, which is most of the spread, cancels in the difference. All intervals here are Student t intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval; `low` and `high` are None where the spread cannot be known (n <
    2)."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        return asdict(self)

    def excludes_zero(self) -> bool:
        """True where the interval lies wholly on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def paired_interval(differences: Sequence[float], *, confidence: float = 0.95) -> Interval | None:
    """The mean of paired differences and its interval, `mean ± t(n-1) · s / sqrt(n)`; None without pairs."""
    values = _finite(differences)
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Interval(mean=mean, low=None, high=None, n=len(values))
    half = _t_quantile(confidence, len(values) - 1) * math.sqrt(_variance(values) / len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half, n=len(values))


def stratified_interval(groups: Iterable[Sequence[float]], *, confidence: float = 0.95) -> Interval | None:
    """The mean of the groups' means with its interval: the overall figure of a table whose cells are fixed
    tasks.

    The groups (RULER's tasks) are chosen, not drawn, so only the spread within each group counts: the
    variance of the mean is `sum(s_g² / n_g) / G²`, with Welch-Satterthwaite degrees of freedom. Groups of one
    sample have no spread of their own; where there is such a group the samples are pooled instead (a wider,
    still valid interval around the same mean of means).
    """
    kept = [values for values in (_finite(group) for group in groups) if values]
    if not kept:
        return None
    n = sum(len(values) for values in kept)
    mean = sum(sum(values) / len(values) for values in kept) / len(kept)
    if n < 2:
        return Interval(mean=mean, low=None, high=None, n=n)
    if any(len(values) < 2 for values in kept):
        pooled = [value for values in kept for value in values]
        half = _t_quantile(confidence, n - 1) * math.sqrt(_variance(pooled) / n)
        return Interval(mean=mean, low=mean - half, high=mean + half, n=n)
    parts = [_variance(values) / len(values) for values in kept]
    total = sum(parts)
    spread = sum(part**2 / (len(values) - 1) for part, values in zip(parts, kept, strict=True))
    half = 0.0 if total == 0 else _t_quantile(confidence, total**2 / spread) * math.sqrt(total) / len(kept)
    return Interval(mean=mean, low=mean - half, high=mean + half, n=n)


def paired(values: Mapping[str, float | None], baseline: Mapping[str, float | None]) -> dict[str, float]:
    """`values - baseline` for every sample key that both have (None and non-finite entries make no pair)."""
    out: dict[str, float] = {}
    for key, value in values.items():
        base = baseline.get(key)
        if value is not None and base is not None and math.isfinite(value - base):
            out[key] = value - base
    return out


def _finite(values: Sequence[float]) -> list[float]:
    return [float(value) for value in values if math.isfinite(value)]


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def _t_quantile(confidence: float, df: float) -> float:
    from scipy.stats import t  # type: ignore[import-untyped]  # late: it takes most of a second

    return float(t.ppf(0.5 + confidence / 2, df))
