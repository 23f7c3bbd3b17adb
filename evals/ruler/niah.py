"""RULER's eight needle tasks: key-value sentences hidden in noise, in prose, or among other needles."""

from __future__ import annotations

from dataclasses import replace

from ..text import Prose
from .constants import DEPTHS, NEEDLE, NOISE, SINGULAR, NiahTask, Template
from .draws import DRAW, Builder, Cell, Draft, distinct, filled, listed


def niah(task: NiahTask, cell: Cell, prose: Prose | None) -> Builder:
    """Builder of one sample. A unit is a line of noise, a word of prose (from its start) or a needle."""
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
    needles = [needle(task, key, value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    queries = rng.sample(keys, task.queries)
    references = tuple(value for key in queries for value in values[key])

    template, type_v = task.template, str(task.type_v)
    if len(references) == 1:
        template, type_v = singular(template), type_v[:-1]

    def build(units: int) -> Draft:
        if task.haystack == "essay":
            assert prose is not None
            haystack = among_sentences(prose.sentences(units), needles, cell)
        else:
            lines = (
                [NOISE] * units if task.haystack == "noise" else distractors(task, cell, units, keys, drawn)
            )
            haystack = among_lines(lines, needles, cell)
        context, question, answer_prefix = filled(
            template, haystack, type_needle_v=type_v, query=listed(queries)
        )
        return Draft(
            context=context,
            question=question,
            answer_prefix=answer_prefix,
            references=references,
            gold=f" {listed(references)}.",
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


def distractors(task: NiahTask, cell: Cell, units: int, keys: list[str], values: set[str]) -> list[str]:
    """Needles that answer nothing: their keys and values are none of the sample's own."""
    rng = cell.rng("distractors")
    return [
        needle(
            task,
            distinct(lambda: DRAW[task.type_k](rng), keys),
            distinct(lambda: DRAW[task.type_v](rng), values),
        )
        for _ in range(units)
    ]


def among_sentences(sentences: list[str], needles: list[str], cell: Cell) -> str:
    """Needles cut in between sentences, at depths drawn from the 40 published ones.

    The blocks are joined by a space even where one is empty (a needle at depth 0), as published.
    """
    depths = sorted(cell.rng("depths").sample(DEPTHS, len(needles)))
    blocks, start = [], 0
    for depth, text in zip(depths, needles, strict=True):
        stop = int(len(sentences) * (depth / 100))
        blocks += [" ".join(sentences[start:stop]), text]
        start = stop
    return " ".join([*blocks, " ".join(sentences[start:])])


def among_lines(lines: list[str], needles: list[str], cell: Cell) -> str:
    """Needles as lines of their own, each before another line of the haystack."""
    places = sorted(cell.rng("places").sample(range(len(lines)), len(needles)), reverse=True)
    for place, text in zip(places, needles, strict=True):
        lines.insert(place, text)
    return "\n".join(lines)
