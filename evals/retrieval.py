"""Retrieval from synthetic contexts, as in InfiniteBench (arXiv 2402.13718): a passkey in noise, and a value
in a JSON object of random keys. Their wording is the published one; prompts are filled to any length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from .ruler.constants import NOISE
from .ruler.draws import uuid4
from .sample import Sample, rng_for
from .task import Task, filled
from .tokens import Filling

PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will "
    "quiz you about the important information there.\n\n{context}\n\n"
)
PASSKEY_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
PASSKEY_QUESTION, PASSKEY_PREFIX = "What is the pass key?", "The pass key is"
PASSKEY_DIGITS = 5
KV = "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}\n\n"
KV_QUESTION, KV_PREFIX = 'Key: "{key}"', "The value associated with the specified key is:"
MAX_NEW_TOKENS = {"passkey": 16, "kv": 64}

_GENERATOR = 1


@dataclass(frozen=True, kw_only=True)
class Retrieval(Task):
    """passkey: five digits in a random line of RULER's noise; kv: one of the uuids of a JSON object. Both may
    stand anywhere, and `extra["true_depths"]` has where, as a share of the lines."""

    suite: ClassVar[str] = "retrieval"
    TASKS: ClassVar[tuple[str, ...]] = ("passkey", "kv")

    def make(self, tokenizer: Any, name: str, length: int, count: int) -> Iterator[Sample]:
        filling = Filling(tokenizer)
        draft = {"passkey": passkey, "kv": kv}[name]
        for index in range(count):
            recipe = {
                "suite": self.suite,
                "generator": _GENERATOR,
                "task": name,
                "length": length,
                "index": index,
                "seed": self.seed,
            }
            yield filled(filling, lambda units, r=recipe: draft(r, units), what=f"{self.suite} task {name}")


def passkey(recipe: dict[str, Any], units: int) -> Sample:
    """The sample with `units` lines of noise."""
    rng = _rng(recipe)
    key = str(rng.randint(10 ** (PASSKEY_DIGITS - 1), 10**PASSKEY_DIGITS - 1))
    place = round(rng.random() * units)
    lines = [NOISE] * place + [PASSKEY_NEEDLE.format(key=key)] + [NOISE] * (units - place)
    return _sample(
        recipe,
        context=PASSKEY.format(context="\n".join(lines)),
        question=PASSKEY_QUESTION,
        answer_prefix=PASSKEY_PREFIX,
        answer=key,
        true_depth=place / units,
    )


def kv(recipe: dict[str, Any], units: int) -> Sample:
    """The sample with `units` pairs of uuids."""
    asked = _rng(recipe).random()
    pairs = json_pairs(recipe, units)
    place = min(int(asked * units), units - 1)
    key, value = pairs[place]
    return _sample(
        recipe,
        context=KV.format(context=json_text(pairs)),
        question=KV_QUESTION.format(key=key),
        answer_prefix=KV_PREFIX,
        answer=value,
        true_depth=place / max(units - 1, 1),
    )


def json_pairs(recipe: dict[str, Any], count: int) -> list[tuple[str, str]]:
    """Different uuids in pairs: the first ones are the same for every count."""
    rng = _rng(recipe, "pairs")
    return [(uuid4(rng), uuid4(rng)) for _ in range(count)]


def json_text(pairs: list[tuple[str, str]]) -> str:
    """A JSON object with a pair a line."""
    return "{" + ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs) + "}"


def _rng(recipe: dict[str, Any], purpose: str = "answer") -> Any:
    coordinates = (recipe[name] for name in ("suite", "seed", "task", "length", "index"))
    return rng_for(*coordinates, purpose)


def _sample(
    recipe: dict[str, Any],
    *,
    context: str,
    question: str,
    answer_prefix: str,
    answer: str,
    true_depth: float,
) -> Sample:
    return Sample(
        suite=recipe["suite"],
        task=recipe["task"],
        length=recipe["length"],
        index=recipe["index"],
        seed=recipe["seed"],
        context=context,
        question=question,
        answer_prefix=answer_prefix,
        references=(answer,),
        gold=f" {answer}",
        max_new_tokens=MAX_NEW_TOKENS[recipe["task"]],
        recipe=recipe,
        extra={"true_depths": [true_depth]},
    )
