"""Tasks of one's own: a class that makes a prompt of a size; farspan fills it to a length and scores it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from ..attention.errors import FarspanError
from .sample import Sample, check_numbers, encode, fill, rng_for

CUSTOM = "custom"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a task asks. The user message is `context + question`; `answer_prefix` begins the model's answer.

    references: an answer is scored by the share of these texts that it contains, in any case. gold: the right
    answer as it continues the prompt, for its likelihood; by default the references with commas between them.
    """

    context: str
    question: str
    references: tuple[str, ...]
    answer_prefix: str = ""
    gold: str | None = None


class Task:
    """A task: its name, and how a prompt of it is made.

    A prompt must depend on `units` and `rng` alone, so that every method, every session and every machine
    gets the same one. `version` is to be raised when the same arguments make another prompt.
    """

    name: ClassVar[str]
    max_new_tokens: ClassVar[int] = 32
    version: ClassVar[int] = 1

    def prompt(self, units: int, rng: random.Random) -> Prompt:
        """A prompt with `units` of text that hides the answer, such as lines; more units make it longer.

        farspan looks for the number of units that fills the length, so it calls this several times, each time
        with a generator that was seeded alike.
        """
        raise NotImplementedError


def make_samples(tokenizer: Any, task: Task, length: int, count: int, seed: int) -> Iterator[Sample]:
    """Samples 0 … count - 1 of a task, each of at most `length` tokens of prompt and answer.

    Raises FarspanError for wrong numbers and a task without a name; at the first sample, for a length that is
    too short, and for a prompt without references.
    """
    check_numbers(length=length, count=count, seed=seed)
    name = getattr(task, "name", None)
    if not isinstance(name, str) or not name or "/" in name:
        raise FarspanError(f"The task {task!r} has the name {name!r}; give its class a name without a slash.")
    return (_make(tokenizer, task, length, index, seed) for index in range(count))


def _make(tokenizer: Any, task: Task, length: int, index: int, seed: int) -> Sample:
    recipe: dict[str, Any] = {"suite": CUSTOM, "task": task.name, "version": task.version}
    recipe |= {"length": length, "index": index, "seed": seed}

    def sample(units: int) -> Sample:
        made = task.prompt(units, rng_for(CUSTOM, task.name, seed, length, index))
        if not made.references:
            raise FarspanError(f"A prompt of the task {task.name} has no references; give at least one.")
        return Sample(
            suite=CUSTOM,
            task=task.name,
            length=length,
            index=index,
            seed=seed,
            context=made.context,
            question=made.question,
            answer_prefix=made.answer_prefix,
            references=made.references,
            gold=f" {', '.join(made.references)}" if made.gold is None else made.gold,
            max_new_tokens=task.max_new_tokens,
            recipe=recipe | {"units": units},
            extra={},
        )

    @cache
    def total(units: int) -> int:
        return len(encode(tokenizer, sample(units))) + task.max_new_tokens

    return sample(fill(total, length, minimum=1, what=f"the task {task.name}"))
