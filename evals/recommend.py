"""The cheapest method whose loss against dense is within a bound, with confidence.

The loss of a method is dense's score minus its own, on the same prompts, as the mean over tasks (see
stats.py). Tasks at which dense scores nothing are left out, because no method can lose there. A method is
within the bound if the one-sided upper confidence limit of its loss is, and beyond the bound if the lower
limit is above it. Between the two the prompts decide nothing: the method is open.

Each limit holds for its method alone. Where many methods are compared, one whose true loss is just above the
bound may pass by luck, about one in 20 of such methods at a confidence of 0.95.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..attention.errors import FarspanError
from .folders import Evaluation, Found
from .stats import strata, stratified_interval
from .summary import BASELINE

KEYS, SECONDS = "keys", "seconds"
WITHIN, OPEN, BEYOND = "within", "open", "beyond"
_CEILING = "oracle"
"""The method that measures other methods: it selects by the true attention, which costs what dense costs."""
_TIMES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Multiples of the number of prompts that are tried in the estimate of how many would decide."""
LARGEST = _TIMES[-1]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method at one length beside dense. Scores and losses are from 0 to 1.

    score, baseline: means over tasks, on the prompts that both answered. loss: `baseline - score`; least,
    most: its one-sided confidence limits, None with fewer than 6 prompts. half: the half width of its
    two-sided interval of the same confidence.
    cost: as `by` says: the mean of the shares of keys read in prefill and in decode, or the seconds of an
    answer; None where it was not measured. saves: whether that is less than dense's. recipe: whether it was
    measured with a calibration of the folder.
    times: for an open method, how many times as many prompts would show it to be within, if they are like
    these; None if its measured loss is above the bound, or if 64 times as many are not enough.
    """

    method: str
    n: int
    tasks: int
    score: float
    baseline: float
    loss: float
    least: float | None
    most: float | None
    half: float | None
    prefill_density: float | None
    decode_density: float | None
    kv_read: float | None
    cost: float | None
    saves: bool
    recipe: bool
    verdict: str
    times: int | None = None

    @property
    def kept(self) -> float | None:
        """The score as a share of dense's; None where dense scores 0."""
        return self.score / self.baseline if self.baseline else None

    @property
    def patch(self) -> str:
        """The call of `farspan.patch` to paste."""
        return f'farspan.patch(model, "{self.method}"{", recipe=RECIPE" if self.recipe else ""})'

    @property
    def options(self) -> str:
        """The options of `farspan generate` to paste."""
        return f'--method "{self.method}"{" --recipe RECIPE" if self.recipe else ""}'


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """What a length's results say about a bound on the loss. `chosen` is None if no method passes.

    candidates: every other method, the cheapest first. tasks: all of them; blind: those at which dense scores
    nothing, which are left out. given: the model as a command takes it. asked: the length that was asked for,
    where `length` stands in for it.
    """

    suite: str
    model: str
    given: str
    dtype: str | None
    length: int
    asked: int
    max_drop: float
    confidence: float
    by: str
    tasks: int
    blind: list[str]
    chosen: Candidate | None
    candidates: list[Candidate] = field(default_factory=list)

    def of(self, verdict: str) -> list[Candidate]:
        """The candidates of a verdict that are not chosen."""
        return [one for one in self.candidates if one.verdict == verdict and one != self.chosen]

    @property
    def closest(self) -> Candidate | None:
        """The method that saves and whose greatest possible loss is least; the least loss without limits."""
        saving = [one for one in self.candidates if one.saves]
        limit = lambda one: 1.0 if one.most is None else one.most  # noqa: E731
        return min(saving, key=lambda one: (limit(one), one.loss), default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def recommend(
    found: Found,
    *,
    max_drop: float = 1.0,
    confidence: float = 0.95,
    length: int | None = None,
    by: str = KEYS,
    extrapolate: bool = False,
) -> list[Recommendation]:
    """A recommendation for each evaluation with scores in the folders.

    max_drop: the loss that is allowed, in points of 100. length: prompt and answer in tokens, by default the
    longest that was measured. by: "keys", the share of keys read, or "seconds" of an answer where `eval
    speed` has measured the same model at the same length. extrapolate: take the nearest measured length where
    the one asked for was not measured.
    Raises FarspanError for wrong numbers, for folders without scores or without dense, for a length that was
    not measured, and for seconds that were not.
    """
    check_bounds(max_drop, confidence)
    if by not in (KEYS, SECONDS):
        raise FarspanError(f"by={by} was given; it is {KEYS} or {SECONDS}.")
    scored = [one for one in found.answers() if lengths_of(one)]
    if not scored:
        raise FarspanError(
            "No folder has a method beside dense on the same scored prompts; run `farspan eval ruler` or "
            "`farspan eval needle` with dense among the methods."
        )
    known = sorted({size for one in scored for size in lengths_of(one)})
    if length is not None and length not in known and not extrapolate:
        raise FarspanError(
            f"Nothing was measured at {length} tokens, only at {', '.join(map(str, known))}; measure it, or "
            "add --extrapolate to get an answer from the nearest of these lengths."
        )
    out = []
    for one in scored:
        sizes = lengths_of(one)
        asked = max(sizes) if length is None else length
        if asked in sizes or extrapolate:
            nearest = min(sizes, key=lambda size: (abs(size - asked), size))
            out.append(at_length(found, one, nearest, asked, max_drop, confidence, by))
    return out


def check_bounds(max_drop: float, confidence: float) -> None:
    """Raises FarspanError for a loss outside 0 to 100 points, or a confidence outside 0.5 to 1."""
    if not 0 <= max_drop <= 100:
        raise FarspanError(
            f"The loss max_drop={max_drop:g} was given; it is in points of score, from 0 to 100."
        )
    if not 0.5 <= confidence < 1:
        raise FarspanError(f"The confidence confidence={confidence:g} was given; it is from 0.5 to below 1.")


def lengths_of(evaluation: Evaluation) -> list[int]:
    """The lengths at which a method stands beside dense on the same prompts, ascending."""
    lines = [row for row in evaluation.data["overall"] if row["n"] and row["method"] != BASELINE]
    return sorted({row["length"] for row in lines if row["score_diff"] is not None})


def at_length(
    found: Found,
    evaluation: Evaluation,
    length: int,
    asked: int,
    max_drop: float,
    confidence: float,
    by: str,
) -> Recommendation:
    """The recommendation from the rows of one length. Raises FarspanError for seconds never measured."""
    seconds = answer_seconds(found, evaluation, length)
    if by == SECONDS and not seconds:
        raise FarspanError(
            f"No seconds were measured for {evaluation.model} at {length} tokens; run `farspan eval speed` "
            "at that length and give its folder too, or use --by keys."
        )
    rows = [row for row in evaluation.rows if row["length"] == length]
    dense = {row["key"]: row["score"] for row in rows if row["method"] == BASELINE}
    by_task: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == BASELINE and row["score"] is not None:
            by_task.setdefault(row["task"], []).append(row["score"])
    blind = [task for task, scores in by_task.items() if not any(scores)]
    overall = {row["method"]: row for row in evaluation.data["overall"] if row["length"] == length}
    candidates = []
    for method, line in overall.items():
        mine = [
            row
            for row in rows
            if row["method"] == method
            and row["task"] not in blind
            and row["score"] is not None
            and dense.get(row["key"]) is not None
        ]
        if method != BASELINE and mine:
            cost, full = (seconds.get(method), seconds.get(None)) if by == SECONDS else (keys_read(line), 1.0)
            recipe = method in evaluation.config["recipes"] and "recipe=" not in method
            candidates.append(_candidate(line, mine, dense, max_drop / 100, confidence, cost, full, recipe))
    order = {WITHIN: 0, OPEN: 1, BEYOND: 2}
    candidates.sort(
        key=lambda one: (order[one.verdict], one.cost is None, one.cost or 0.0, one.kv_read or 0.0)
    )
    passing = [one for one in candidates if one.verdict == WITHIN and one.saves]
    return Recommendation(
        suite=evaluation.suite,
        model=evaluation.model,
        given=evaluation.given,
        dtype=evaluation.config.get("dtype"),
        length=length,
        asked=asked,
        max_drop=max_drop,
        confidence=confidence,
        by=by,
        tasks=len(by_task),
        blind=blind,
        chosen=passing[0] if passing else None,
        candidates=candidates,
    )


def answer_seconds(found: Found, evaluation: Evaluation, length: int) -> dict[str | None, float]:
    """The seconds of a prefill and the tokens after it by method, at one length; of None, the baseline's."""
    out: dict[str | None, float] = {}
    for one in found.speeds(evaluation):
        for row in one.data["overall"]:
            if row["length"] == length:
                tokens = one.config["new_tokens"] * one.config["batch_size"]
                spent = row["prefill_seconds"] + tokens / row["decode_tokens_per_second"]
                out[row["method"]] = spent
                if row["method"] == one.data["baseline"]:
                    out[None] = spent
    return out


def keys_read(line: Mapping[str, Any]) -> float | None:
    """The mean of the shares of keys read in prefill and in decode; None where a phase was not measured."""
    shares = line["prefill_density"], line["decode_density"]
    return None if None in shares else sum(shares) / 2


def _candidate(
    line: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    dense: Mapping[str, float],
    allowed: float,
    confidence: float,
    cost: float | None,
    full_cost: float | None,
    recipe: bool,
) -> Candidate:
    losses = strata((row, dense[row["key"]] - row["score"]) for row in rows)
    bases = strata((row, dense[row["key"]]) for row in rows)
    baseline = sum(sum(group) / len(group) for group in bases) / len(bases)
    one_sided = stratified_interval(losses, bound=1, confidence=2 * confidence - 1)
    two_sided = stratified_interval(losses, bound=1, confidence=confidence)
    assert one_sided is not None and two_sided is not None
    least, most = one_sided.low, one_sided.high
    verdict = OPEN
    if most is not None and most <= allowed:
        verdict = WITHIN
    elif least is not None and least > allowed:
        verdict = BEYOND
    half = None
    if two_sided.low is not None and two_sided.high is not None:
        half = (two_sided.high - two_sided.low) / 2
    return Candidate(
        method=line["method"],
        n=one_sided.n,
        tasks=len({row["task"] for row in rows}),
        score=baseline - one_sided.mean,
        baseline=baseline,
        loss=one_sided.mean,
        least=least,
        most=most,
        half=half,
        prefill_density=line["prefill_density"],
        decode_density=line["decode_density"],
        kv_read=line["kv_read"],
        cost=cost,
        saves=cost is not None
        and full_cost is not None
        and cost < full_cost
        and not re.search(rf"\b{_CEILING}\b", line["method"]),
        recipe=recipe,
        verdict=verdict,
        times=_times(losses, allowed, confidence) if verdict == OPEN else None,
    )


def _times(losses: list[list[float]], allowed: float, confidence: float) -> int | None:
    """How many times these prompts, taken again and again, would show the loss to be allowed."""
    for times in _TIMES:
        found = stratified_interval(
            [group * times for group in losses], bound=1, confidence=2 * confidence - 1
        )
        if found is not None and found.high is not None and found.high <= allowed:
            return times
    return None
