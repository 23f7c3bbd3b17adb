"""One evaluation sample: the parts of its prompt, its tokens, and the score of an answer.

Sizing is here too. A sample of length L is filled with whole units of haystack, as many as fit: one more
would make prompt tokens + generated tokens exceed L. They are counted with the model's tokenizer and chat
template.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..attention.errors import FarspanError
from ..runtime.models import plain_ids, prompt_ids

_CONTROL = re.compile(r"[\x00-\x1f]")
_MAX_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with its answer.

    The user message is `context + question`. They are separate, so that methods that compress the context
    without the question can be judged fairly. `answer_prefix` follows the assistant's header and is part of
    the prompt.
    """

    suite: str
    """The suite of its task, such as "ruler"."""
    task: str
    length: int
    """Tokens of the cell: encoded prompt + `max_new_tokens` is at most this."""
    index: int
    """Number of the sample in its cell, from 0."""
    seed: int
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    """What a right answer contains."""
    gold: str
    """The right answer as it would continue the prompt right after `answer_prefix` (for teacher forcing)."""
    max_new_tokens: int
    recipe: dict[str, Any]
    """JSON-able; `rebuild` makes this sample from it."""
    extra: dict[str, Any]
    """Further coordinates of the cell, e.g. {"depth": 0.5}."""
    metric: str = "all"
    """How an answer is scored: a name in METRICS."""

    @property
    def user(self) -> str:
        """The whole user message."""
        return self.context + self.question

    @property
    def keys(self) -> list[str]:
        """The keys of its rows."""
        return [key(self)]


def key(sample: Sample) -> str:
    """The name of a sample, `suite/task/length[/depth]/index`, by which a resumed run finds it."""
    depth = [f"depth={sample.extra['depth']:g}"] if "depth" in sample.extra else []
    return "/".join([sample.suite, sample.task, str(sample.length), *depth, str(sample.index)])


def score(sample: Sample, answer: str) -> float:
    """The score of a generated answer, from 0 to 1, by the sample's metric."""
    return METRICS[sample.metric](answer, sample.references)


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """The fraction of references that the answer contains, as lower-cased substrings (RULER, 2404.06654)."""
    return sum(_contained(answer, references)) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if the answer contains one of the references, as a lower-cased substring, else 0 (RULER's question
    answering)."""
    return float(any(_contained(answer, references)))


def _contained(answer: str, references: Sequence[str]) -> list[bool]:
    said = _CONTROL.sub("\n", answer).lower()
    return [reference.lower() in said for reference in references]


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "all": string_match_all,
    "part": string_match_part,
}


def encode(tokenizer: Any, sample: Sample) -> list[int]:
    """Token ids of the prompt, [T]: the user message, in the tokenizer's chat format if it has one, and the
    answer prefix.

    A template that writes today's date gets a fixed date, so that prompts do not change from day to day.
    """
    return prompt_ids(tokenizer, sample.user, sample.answer_prefix, clock=False)


def encode_gold(tokenizer: Any, sample: Sample) -> list[int]:
    """Token ids of the gold answer, [N], as they continue `encode(tokenizer, sample)`.

    They are taken from the tokens of prompt and gold in one text, because a tokenizer may give the start of a
    text another token than the middle. If the prompt's last token would merge with the answer, the answer is
    encoded alone.
    """
    prompt = encode(tokenizer, sample)
    whole = prompt_ids(tokenizer, sample.user, sample.answer_prefix + sample.gold, clock=False)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return plain_ids(tokenizer, sample.gold)


def rng_for(*parts: str | int | float) -> random.Random:
    """A random generator seeded by the parts alone: the same in every process, on every machine and
    Python."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def fill(
    total: Callable[[int], int],
    length: int,
    *,
    minimum: int,
    what: str,
    most: int | None = None,
) -> int:
    """The number n of haystack units, at least `minimum`, with total(n) <= length < total(n + 1); `most` if
    there are no more units and they all fit.

    total(units) is the number of tokens (prompt + generated) with that many units. It need not grow with
    every unit. The search interpolates between a size that fits and one that does not, so it builds few
    prompts. Raises FarspanError if `minimum` units do not fit; `what` names the task in that sentence.
    """
    low, low_total = minimum, total(minimum)
    if low_total > length:
        raise FarspanError(
            f"{what} needs a length of at least {low_total} tokens with this tokenizer (prompt and generated "
            f"tokens), {length} was given; give a longer length."
        )
    floor_total = low_total
    high, high_total = 0, 0  # no size is known yet that is too long
    for step in range(_MAX_STEPS):
        if high and high - low == 1:
            return low
        if not high:
            growth = (low_total - floor_total) / (low - minimum) if low > minimum else 0.0
            ahead = int((length - low_total) / growth) + 1 if growth > 0 else low + 8
            guess = low + min(ahead, 8 * low + 64)
        elif step % 8 == 7:  # interpolation may creep from one side: bisect now and then
            guess = (low + high) // 2
        else:
            guess = low + int((length - low_total) * (high - low) / (high_total - low_total))
        guess = max(guess, low + 1)
        if high:
            guess = min(guess, high - 1)
        if most is not None:
            if low == most:
                return low
            guess = min(guess, most)
        tokens = total(guess)
        if tokens <= length:
            low, low_total = guess, tokens
        else:
            high, high_total = guess, tokens
    raise FarspanError(
        f"{what} could not be filled to {length} tokens: {low} haystack units make {low_total} and more "
        "units do not add tokens; check the tokenizer."
    )


def check_numbers(*, length: object, count: object, seed: object) -> None:
    """Raises FarspanError for a length or count that is not a positive whole number, and a seed that is not
    whole."""
    for name, value, least in (("length", length, 1), ("count", count, 1), ("seed", seed, None)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or (least is not None and value < least):  # type: ignore[operator]
            wanted = "a whole number" if least is None else f"a whole number of at least {least}"
            raise FarspanError(f"{name} {value!r} is not {wanted}; give one.")


def check_tokens(recipe: dict[str, Any], tokens: int) -> None:
    """Raises FarspanError for a rebuilt prompt whose number of tokens is not the recorded one."""
    if recipe.get("prompt_tokens") not in (None, tokens):
        raise FarspanError(
            f"the rebuilt prompt has {tokens} tokens and had {recipe['prompt_tokens']} when it was made; "
            "give the tokenizer, with the chat template, that it was made with."
        )
