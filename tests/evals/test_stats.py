"""Intervals: by hand, at their limits, and how often they hold the truth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from farspan.evals.stats import FEWEST, Interval, paired, paired_interval, stratified_interval


def sides(found: Interval | None) -> tuple[float, float, float]:
    assert found is not None and found.low is not None and found.high is not None and found.reason is None
    return found.low, found.mean, found.high


def test_paired_interval_by_hand() -> None:
    # s² = 3.5, s/sqrt(6) = 0.763763, t(0.975, 5) = 2.570582 (tables)
    half = 2.570582 * 0.763763
    assert sides(paired_interval([1, 2, 3, 4, 5, 6])) == pytest.approx(
        (3.5 - half, 3.5, 3.5 + half), abs=1e-5
    )


def test_stratified_interval_by_hand() -> None:
    # each group: s²/n = 4/3; se = sqrt(8/3)/2; df = (8/3)² / (2 · (4/3)²/2) = 4; t(0.975, 4) = 2.776445.
    # The groups' own means, ten apart, do not widen it.
    half = 2.776445 * math.sqrt(8 / 3) / 2
    found = stratified_interval([[0, 2, 4], [10, 12, 14]])
    assert sides(found) == pytest.approx((7 - half, 7, 7 + half), abs=1e-5)


def test_a_group_of_one_takes_the_spread_of_all() -> None:
    # all six: s² = 13.3333/5 = 2.66667, df 5; the group of five: s²/n = 0.5, df 4; the mean of the two means
    # has the variance (2.66667 + 0.5)/4, whatever number of samples the large group has.
    df = (2.66667 + 0.5) ** 2 / (2.66667**2 / 5 + 0.5**2 / 4)
    half = t.ppf(0.975, df) * math.sqrt(2.66667 + 0.5) / 2
    assert sides(stratified_interval([[5], [1, 2, 3, 4, 5]])) == pytest.approx(
        (4 - half, 4, 4 + half), abs=1e-4
    )
    singles = stratified_interval([[x] for x in (1, 2, 3, 4, 5, 6)])
    assert sides(singles) == pytest.approx(sides(paired_interval([1, 2, 3, 4, 5, 6])))


@pytest.mark.parametrize(("n", "half"), [(6, 0.446871), (20, 0.136829), (220, 0.012583)])
def test_bounded_differences_that_are_all_zero_have_an_interval(n: int, half: float) -> None:
    """With -1 and +1 besides: s² = 2/(n + 1), of n + 2 values: t(n + 1) · s / sqrt(n + 2), about 2.8/n."""
    assert sides(paired_interval([0.0] * n, bound=1)) == pytest.approx((-half, 0, half), abs=1e-5)
    assert 2.5 / n < half < 4 / n


def test_pseudo_observations_are_divided_among_the_tasks() -> None:
    # of each of two tasks: n = 3 + 1, mean 0, s² = 2 · 1/2 / 3 = 1/3, s²/n = 1/12, df 3
    half = t.ppf(0.975, 6) * math.sqrt(2 / 12) / 2
    assert sides(stratified_interval([[0.0] * 3] * 2, bound=1)) == pytest.approx((-half, 0, half))


def test_no_interval_of_scores_passes_their_bounds_or_leaves_its_mean_out() -> None:
    for values in itertools.product((-1.0, -0.25, 0.0, 1.0), repeat=FEWEST):
        for groups in ([values], [values[:2], values[2:4], values[4:]], [values[:1], values[1:]]):
            low, mean, high = sides(stratified_interval(groups, bound=1))
            assert -1 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1 and high - low > 0.1


def test_too_few_pairs_have_no_interval() -> None:
    for groups in ([[0.0] * (FEWEST - 1)], [[1.0, -1.0], [0.5, 1.0]], [[3.0]]):
        for bound in (None, 4.0):
            found = stratified_interval(groups, bound=bound)
            assert found is not None and (found.low, found.high, found.reason) == (None, None, "too few")
    assert paired_interval([]) is None and stratified_interval([[], []]) is None
    found = paired_interval([2.0, 2.0, float("nan")])
    assert found is not None
    assert found.to_dict() == {"mean": 2.0, "low": None, "high": None, "n": 2, "reason": "too few"}


def test_equal_differences_without_a_bound_have_no_interval() -> None:
    for groups in ([[0.0] * 50], [[1.0] * 20, [2.0] * 20]):
        found = stratified_interval(groups)
        assert found is not None and (found.low, found.high, found.reason) == (None, None, "no spread")


SCORES = np.array([0, 0.25, 0.5, 0.75, 1])
Draw = Callable[[np.random.Generator, int], Any]


def lost(share: float, by: float = 1.0) -> tuple[Draw, float]:
    """A method that loses `by` of a score on a share of the prompts, and nothing on the others."""
    return lambda rng, n: -by * (rng.random(n) < share), -by * share


def pairs(dense: list[float], method: list[float]) -> tuple[Draw, float]:
    """Scores that have nothing to do with each other, each value with its probability."""

    def draw(rng: np.random.Generator, n: int) -> Any:
        return rng.choice(SCORES, n, p=method) - rng.choice(SCORES, n, p=dense)

    return draw, float(SCORES @ method - SCORES @ dense)


BOUNDED = {
    "never loses": lost(0.0),
    "loses 2 %": lost(0.02),
    "loses 10 %": lost(0.1),
    "loses half": lost(0.5),
    "loses 95 %": lost(0.95),
    "loses quarters": lost(0.3, by=0.25),
    "all or nothing": pairs([0.4, 0, 0, 0, 0.6], [0.6, 0, 0, 0, 0.4]),
    "graded": pairs([0.1, 0.1, 0.2, 0.3, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]),
}
UNBOUNDED: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "heavy tails": (lambda rng, n: rng.standard_t(3, size=n), 0.0),
    "skewed": (lambda rng, n: rng.gamma(4.0, size=n), 4.0),
}
SHAPES = {
    "6": [6],
    "10": [10],
    "20": [20],
    "3 x 2": [2] * 3,
    "5 x 4": [4] * 5,
    "11 x 1": [1] * 11,
    "1 + 20": [1, 20],
    "2 + 20": [2, 20],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*BOUNDED, *UNBOUNDED])
def test_intervals_hold_the_truth(name: str, shape: str) -> None:
    """Of 95 % intervals at least 90 % do, for few prompts and for scores that hardly ever differ."""
    bound = 1.0 if name in BOUNDED else None
    draw, truth = (BOUNDED | UNBOUNDED)[name]
    rng = np.random.default_rng(7)
    runs = 300
    held = 0
    for _ in range(runs):
        low, _, high = sides(stratified_interval([draw(rng, n) for n in SHAPES[shape]], bound=bound))
        held += low <= truth <= high
    assert held / runs >= 0.9


def test_pairs_are_by_key_and_finite() -> None:
    mine = {"a": 1.0, "b": 2.0, "c": None, "d": float("nan"), "e": 5.0}
    dense = {"a": 0.5, "b": None, "c": 1.0, "d": 1.0, "f": 1.0}
    assert paired(mine, dense) == {"a": 0.5}
