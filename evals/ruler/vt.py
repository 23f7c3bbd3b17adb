"""RULER's variable tracking: a chain of assignments hidden in noise, behind a solved example in noise."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..sample import fill
from .constants import (
    NOISE,
    VARIABLE_TRACKING,
    VT_EXAMPLE_LETTERS,
    VT_EXAMPLE_TOKENS,
    VT_HOPS,
    VT_LETTERS,
    VT_VALUES,
)
from .draws import Builder, Cell, Draft, distinct, filled

MINIMUM = VT_HOPS + 1
"""The least number of lines of noise: each assignment stands before a different line."""


@dataclass(frozen=True)
class Chain:
    """VAR names[0] = value, VAR names[1] = VAR names[0], …: all names have the value."""

    value: str
    names: tuple[str, ...]

    def hidden(self, lines: int, rng: random.Random) -> str:
        """The assignments in their order, at places drawn from `lines` lines of noise."""
        # Every assignment but the first has a space at its end, as published.
        chain = [f"VAR {self.names[0]} = {self.value}"]
        chain += [f"VAR {name} = VAR {held} " for held, name in zip(self.names, self.names[1:], strict=False)]
        text = [NOISE] * lines
        places = sorted(rng.sample(range(lines), len(chain)))
        for before, (place, assignment) in enumerate(zip(places, chain, strict=True)):
            text.insert(place + before, assignment)
        return "\n".join(text)

    def filled(self, lines: int, rng: random.Random) -> tuple[str, str, str]:
        return filled(VARIABLE_TRACKING, self.hidden(lines, rng), query=self.value, num_v=len(self.names))


def variable_tracking(cell: Cell, example_lines: int) -> Builder:
    """The builder of one sample. A unit is a line of noise; the solved example has `example_lines` of
    them."""
    example = _example(cell)
    chain = _chain(cell.rng("chain"), VT_LETTERS, not_value=example.value)
    # The prefix ends with a space, and another one follows: as published.
    solved = "".join(example.filled(example_lines, _layout(cell).rng("example places")))
    solved += " " + " ".join(example.names) + "\n\n"

    def build(units: int) -> Draft:
        context, question, answer_prefix = chain.filled(units, cell.rng("places"))
        return Draft(
            context=solved + context,
            question=question,
            answer_prefix=answer_prefix,
            references=chain.names,
            gold=" " + " ".join(chain.names),
        )

    return build


def example_lines(cell: Cell, count_tokens: Callable[[str], int]) -> int:
    """Lines of noise that fill the solved example, without its answer, to the published 500 tokens."""
    example = _example(cell)

    def tokens(lines: int) -> int:
        return count_tokens("".join(example.filled(lines, _layout(cell).rng("example places"))))

    if tokens(MINIMUM) > VT_EXAMPLE_TOKENS:
        return MINIMUM
    return fill(tokens, VT_EXAMPLE_TOKENS, minimum=MINIMUM, what="the solved example of ruler task vt")


def _layout(cell: Cell) -> Cell:
    """The cell of which the example has its value and its places: in the published generator (compat) the
    first one, whose names alone are drawn anew for each sample."""
    return replace(cell, index=0) if cell.compat else cell


def _example(cell: Cell) -> Chain:
    chain = _chain(cell.rng("example chain"), VT_EXAMPLE_LETTERS, not_value="")
    first = _layout(cell)
    return chain if first == cell else Chain(_example(first).value, chain.names)


def _chain(rng: random.Random, letters: int, *, not_value: str) -> Chain:
    names = ["VAR"]  # no variable has the keyword as its name
    for _ in range(VT_HOPS + 1):
        names.append(distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), names))
    value = distinct(lambda: str(rng.randrange(*VT_VALUES)), (not_value,))
    return Chain(value, tuple(names[1:]))
