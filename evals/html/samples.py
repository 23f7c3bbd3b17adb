"""Samples for a report: the end of a prompt, what a right answer contains, and every method's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...attention.errors import FarspanError
from .. import needle, ruler
from ..folders import NEEDLE, RULER, Evaluation
from ..run import QUOTED
from ..sample import Sample
from ..summary import BASELINE
from ..tables import percent, short_length
from .view import Cell, Grid

MOST = 12
"""Samples of an evaluation that a report shows."""
LONGEST = 600
"""Characters of an answer that a report shows."""
REBUILD = {RULER: ruler.rebuild, NEEDLE: needle.rebuild}


@dataclass(frozen=True)
class Shown:
    """A sample of a report. question: the end of its prompt, or a sentence that says why it is missing."""

    title: str
    question: str
    references: str
    answers: Grid


def choose(one: Evaluation) -> list[Shown]:
    """At most `MOST` samples, the longest first: of each task the prompts on which methods differ most."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in one.rows:
        groups.setdefault(row["key"], []).append(row)
    cells: dict[tuple[int, str], list[list[Mapping[str, Any]]]] = {}
    for rows in groups.values():
        if len(rows) > 1:
            cells.setdefault((-rows[0]["length"], rows[0]["task"]), []).append(rows)
    for found in cells.values():
        found.sort(key=lambda rows: (-_spread(rows), -len(rows), rows[0].get("index") or 0))
    ordered = [
        cells[cell][place] for place in range(MOST) for cell in sorted(cells) if place < len(cells[cell])
    ]
    return [_shown(rows, one.config.get("methods", [])) for rows in ordered[:MOST]]


def _spread(rows: Sequence[Mapping[str, Any]]) -> float:
    scores = [row["score"] for row in rows if row["score"] is not None]
    return max(scores) - min(scores) if scores else 0.0


def _shown(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> Shown:
    first = rows[0]
    question, references = _prompt_end(first)
    depth = first["extra"].get("depth")
    place = "" if depth is None else f", needle at {100 * depth:.0f} %"
    title = f"{first['task']} at {short_length(first['length'])}{place}, prompt {first.get('index', '?')}"
    order = {method: number for number, method in enumerate([BASELINE, *methods])}
    answers: list[list[Cell | str]] = [
        [row["method"], Cell(percent(row["score"], 0), "", row["score"]), _cut(row.get("answer"))]
        for row in sorted(rows, key=lambda row: order.get(row["method"], len(order)))
    ]
    return Shown(
        title, question, references, Grid(f"Answers: {title}", ["method", "score", "answer"], answers)
    )


def _prompt_end(row: Mapping[str, Any]) -> tuple[str, str]:
    """The end of the prompt and the references. Rows of earlier versions lack them: their sample is rebuilt
    from its recipe, where the text that it was made from is installed."""
    if isinstance(row.get("question"), str) and isinstance(row.get("references"), list):
        return row["question"], ", ".join(map(str, row["references"]))
    try:
        sample: Sample = REBUILD[row["suite"]](None, row["recipe"])
    except (FarspanError, KeyError) as error:
        return f"The prompt cannot be made again here ({error}).", "not recorded"
    return (sample.question + sample.answer_prefix)[-QUOTED:], ", ".join(sample.references)


def _cut(answer: Any) -> str:
    text = answer if isinstance(answer, str) else "not recorded"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text)} characters)"
