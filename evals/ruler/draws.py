"""Shared by the tasks: a sample's cell, the parts of a prompt, and random words, numbers and uuids."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError
from ..sample import rng_for
from .constants import NUMBER_DIGITS, Kind, Template

_MAX_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The coordinates of one sample. Everything random in it comes from `rng` and `order`.

    compat: whether the sample has the published generator's quirks (see the package's docstring).
    """

    task: str
    length: int
    index: int
    seed: int
    compat: bool = False

    def rng(self, purpose: str) -> random.Random:
        """A random generator for one purpose, so that drawing more for it changes nothing else."""
        return rng_for("ruler", self.seed, self.task, self.length, self.index, purpose)

    def order(self, purpose: str) -> random.Random:
        """A random generator that shuffles items of a prompt. In the published generator (compat) every
        sample has the same one."""
        return random.Random(self.seed) if self.compat else self.rng(purpose)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """The text of a sample with some number of haystack units (see Sample for the fields)."""

    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    gold: str
    extra: dict[str, Any] = field(default_factory=dict)


Builder = Callable[[int], Draft]
"""Number of haystack units -> the sample's text. The same number gives the same text."""


def filled(template: Template, context: str, **blanks: object) -> tuple[str, str, str]:
    """(context, question, answer prefix) of a template. The user message is split after the haystack."""
    before, question = template.text.split("{context}\n")
    return (
        before.format(**blanks) + context + "\n",
        question.format(**blanks),
        template.answer_prefix.format(**blanks),
    )


def listed(items: list[str] | tuple[str, ...]) -> str:
    """A list of items as RULER writes several queries: "a, b, and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]


def shuffle(rng: random.Random, items: list[Any]) -> None:
    """`rng.shuffle(items)`, with the same result, in half the time: prompts have lists of 70,000 words."""
    bits = rng.getrandbits
    for last in range(len(items) - 1, 0, -1):
        width = (last + 1).bit_length()
        place = bits(width)
        while place > last:
            place = bits(width)
        items[last], items[place] = items[place], items[last]


@lru_cache(maxsize=1)
def word_lists() -> dict[str, tuple[str, ...]]:
    """The "nouns", "adjectives" and "verbs" of `wonderwords`, each sorted and without repeats.

    They are read from the package's files, and sorted because the order of a set differs between processes.
    """
    spec = find_spec("wonderwords")
    if spec is None or not spec.submodule_search_locations:
        raise FarspanError(
            "RULER's words come from the package wonderwords, which is not installed; install it with "
            "`pip install 'farspan[evals]'`."
        )
    assets = Path(spec.submodule_search_locations[0]) / "assets"
    return {
        f"{kind}s": tuple(sorted({line.strip() for line in lines if line.strip()}))
        for kind in ("noun", "adjective", "verb")
        for lines in [(assets / f"{kind}list.txt").read_text(encoding="utf-8").splitlines()]
    }


def words_recipe() -> str:
    """Name and version of the word list, for recipes."""
    return f"wonderwords {metadata.version('wonderwords')}"


def word(rng: random.Random) -> str:
    """An adjective and a noun with a hyphen between them."""
    lists = word_lists()
    return f"{rng.choice(lists['adjectives'])}-{rng.choice(lists['nouns'])}"


def number(rng: random.Random) -> str:
    return str(rng.randint(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS - 1))


def uuid4(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


DRAW: dict[Kind, Callable[[random.Random], str]] = {"words": word, "numbers": number, "uuids": uuid4}


def distinct(draw: Callable[[], str], taken: Container[str]) -> str:
    """A draw that is not in `taken`. Raises FarspanError after 1,000 draws, which no list here needs."""
    for _ in range(_MAX_DRAWS):
        drawn = draw()
        if drawn not in taken:
            return drawn
    raise FarspanError(f"{_MAX_DRAWS} draws gave no new item; the list they are drawn from is too short.")
