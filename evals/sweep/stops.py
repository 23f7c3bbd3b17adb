"""Cells of a sweep that are not worth going on with, decided from their first prompts.

The decision depends on these prompts alone. So a sweep that was stopped and goes on decides as one that was
not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...attention.errors import FarspanError
from ..stats import FEWEST, paired, stratified_interval
from ..summary import BASELINE
from ..task import Cell


@dataclass(frozen=True, kw_only=True)
class Stops:
    """When a cell ends early.

    prompts: how many of its prompts are looked at, at least 6, which an interval needs. dense_below: all
    methods end where dense's mean score on them is at most this (points of 100). loss_above: a method ends
    where its loss against dense on them is above this (points) with the confidence.
    """

    FIELDS: ClassVar[frozenset[str]] = frozenset({"prompts", "dense_below", "loss_above", "confidence"})
    prompts: int = FEWEST
    dense_below: float | None = None
    loss_above: float | None = None
    confidence: float = 0.95

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Stops:
        """From the YAML file. Raises FarspanError for a wrong value."""
        for name, value in fields.items():
            if isinstance(value, bool) or not isinstance(value, int if name == "prompts" else (int, float)):
                raise FarspanError(f"{name} of stop is {value!r}; it must be a number.")
        stops = cls(**fields)
        if stops.prompts < FEWEST or not 0.5 <= stops.confidence < 1:
            raise FarspanError(
                f"stop has prompts {stops.prompts} and confidence {stops.confidence}; prompts is at least "
                f"{FEWEST}, and confidence from 0.5 to below 1."
            )
        if stops.loss_above is not None:
            lost = stratified_interval([[1.0] * stops.prompts], bound=1, confidence=2 * stops.confidence - 1)
            if lost is None or lost.low is None or 100 * lost.low <= stops.loss_above:
                raise FarspanError(
                    f"stop has loss_above {stops.loss_above:g}, which {stops.prompts} prompts cannot show "
                    f"with confidence {stops.confidence:g}, even where a method loses all; give more prompts."
                )
        return stops

    def decide(self, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """The methods that end, each with its sentence. rows: those of the cell; of each method the first
        `prompts` items count, and a method without all of them goes on."""
        first = cell.items[: self.prompts]
        found = {(row["key"], row["method"]): row["score"] for row in rows}
        methods = dict.fromkeys(row["method"] for row in rows)
        scores = {method: _means(found, first, method) for method in methods}
        dense = scores.get(BASELINE, {})
        if len(dense) < self.prompts:
            return {}
        mean = sum(dense.values()) / len(dense)
        if self.dense_below is not None and 100 * mean <= self.dense_below:
            said = f"{cell.name}: stopped after {self.prompts} prompts, because dense scores {100 * mean:.1f}"
            return dict.fromkeys(methods, f"{said}.")
        out = {}
        for method, own in scores.items():
            if method == BASELINE or self.loss_above is None or len(own) < self.prompts:
                continue
            losses = [-x for x in paired(own, dense).values()]
            lost = stratified_interval([losses], bound=1, confidence=2 * self.confidence - 1)
            if lost is not None and lost.low is not None and 100 * lost.low > self.loss_above:
                out[method] = (
                    f"{cell.name}: {method} stopped after {self.prompts} prompts, because it loses more than "
                    f"{self.loss_above:g} points (measured {100 * lost.mean:.1f})."
                )
        return out


def _means(
    scores: Mapping[tuple[str, str], float | None], items: Sequence[Sequence[str]], method: str
) -> dict[str, float]:
    """The mean score of each item under a method, by its first key: the turns of a conversation are not
    independent. Items without all of their scores are left out."""
    out = {}
    for keys in items:
        own = [scores.get((key, method)) for key in keys]
        known = [score for score in own if score is not None]
        if len(known) == len(keys):
            out[keys[0]] = sum(known) / len(known)
    return out
