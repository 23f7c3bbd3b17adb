"""RULER's eight needle tasks: key-value sentences hidden in noise, in prose, or among other needles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from ..pieces import hide
from ..text import Prose
from .constants import DEPTHS, NEEDLE, NOISE, SINGULAR, NiahTask, Template
from .draws import DRAW, Builder, Cell, Draft, distinct, filled, listed


def niah(task: NiahTask, cell: Cell, prose: Prose | None) -> Builder:
    """The builder of one sample. A unit is a line of noise, a unit of the text (from its start) or a needle.

    `extra["true_depths"]` are the depths of the needles that hold the references, in the order of the
    references. A depth is the share of the haystack's characters before the needle.
    """
    rng = cell.rng("needles")
    keys: list[str] = []
    values: dict[str, list[str]] = {}
    drawn: set[str] = set()
    for _ in range(task.keys):
        keys.append(distinct(lambda: DRAW[task.type_k](rng), keys))
        values[keys[-1]] = []
        for _ in range(task.values):
            value = distinct(lambda: DRAW[task.type_v](rng), drawn)
            drawn.add(value)
            values[keys[-1]].append(value)
    needles = [(value, needle(task, key, value)) for key in keys for value in values[key]]
    (cell.order("needles") if cell.compat else rng).shuffle(needles)
    queries = rng.sample(keys, task.queries)
    references = tuple(value for key in queries for value in values[key])

    template, type_v = task.template, str(task.type_v)
    if len(references) == 1:
        template, type_v = singular(template), type_v[:-1]

    essay = task.haystack == "essay"
    more = distractors(task, cell, keys, drawn)
    others: list[str] = []

    def build(units: int) -> Draft:
        if essay:
            assert prose is not None
            pieces = prose.pieces(units)
            places = essay_places(len(pieces), len(needles), cell)
        else:
            if task.haystack == "noise":
                pieces = [f"{NOISE}\n"] * units
            else:
                others.extend(islice(more, max(units - len(others), 0)))
                pieces = others[:units]
            places = line_places(len(pieces), len(needles), cell)
        haystack, depths = hide(pieces, zip(places, (text for _, text in needles), strict=True), gaps=essay)
        depth_of = dict(zip((value for value, _ in needles), depths, strict=True))
        context, question, answer_prefix = filled(
            template, haystack, type_needle_v=type_v, query=listed(queries)
        )
        return Draft(
            context=context,
            question=question,
            answer_prefix=answer_prefix,
            references=references,
            gold=f" {listed(references)}.",
            extra={"true_depths": [depth_of[value] for value in references]},
        )

    return build


def needle(task: NiahTask, key: str, value: str) -> str:
    return NEEDLE.format(type_needle_v=task.type_v, key=key, value=value)


def singular(template: Template) -> Template:
    """The wording for one value: "A special magic number is hidden", "What is the", "… is"."""
    text, answer_prefix = template.text, template.answer_prefix
    for plural, one in SINGULAR:
        text, answer_prefix = text.replace(plural, one), answer_prefix.replace(plural, one)
    return replace(template, text=text, answer_prefix=answer_prefix)


def distractors(task: NiahTask, cell: Cell, keys: list[str], values: set[str]) -> Iterator[str]:
    """Lines of needles without an answer: their keys and values are not among those of the sample."""
    rng = cell.rng("distractors")
    while True:
        key = distinct(lambda: DRAW[task.type_k](rng), keys)
        value = distinct(lambda: DRAW[task.type_v](rng), values)
        yield f"{needle(task, key, value)}\n"


def essay_places(pieces: int, needles: int, cell: Cell) -> list[int]:
    """The pieces before which needles stand, ascending: at published depths, counted in pieces."""
    return [int(pieces * (depth / 100)) for depth in sorted(cell.rng("depths").sample(DEPTHS, needles))]


def line_places(lines: int, needles: int, cell: Cell) -> list[int]:
    """The lines before which needles stand, ascending and all different."""
    return sorted(cell.rng("places").sample(range(lines), needles))
