"""What an evaluation asks: a task makes samples and scores answers.

A task of your own is a subclass:

    @dataclass(frozen=True, kw_only=True)
    class Echo(Task):
        suite: ClassVar[str] = "echo"

        def make(self, tokenizer, name, length, count):
            filling = Filling(tokenizer)
            for index in range(count):
                draft = lambda units: Sample(suite=self.suite, task=name, length=length, index=index, ...)
                yield filled(filling, draft, what="echo")

    task = Echo(lengths=[4096])
    run(setup, task.draw(tokenizer), score=task.score)

It is run, resumed, summarised and shown as the others are (see run.py). `examples/own_task.py` is a whole
one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..attention.errors import FarspanError
from .sample import METRICS, Sample, check_numbers, fill
from .tokens import Filling


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Samples for `tasks` (names that `TASKS` allows) at `lengths` tokens of prompt and answer.

    samples: how many for each cell. The same seed gives the same samples.
    Raises FarspanError for wrong numbers and for an unknown name.
    """

    suite: ClassVar[str]
    """The name of the suite, in rows, keys and files."""
    TASKS: ClassVar[tuple[str, ...]] = ()
    """The names that `tasks` may have; empty: one task that is called like the suite."""

    lengths: Sequence[int]
    tasks: Sequence[str] = ()
    samples: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.lengths:
            raise FarspanError(f"{self.suite} was given no length; give at least one.")
        for length in self.lengths:
            check_numbers(length=length, count=self.samples, seed=self.seed)
        allowed = self.TASKS or (self.suite,)
        if unknown := [name for name in self.tasks if name not in allowed]:
            raise FarspanError(
                f"there is no {self.suite} task {unknown[0]!r}; the tasks are {', '.join(allowed)}."
            )

    @abstractmethod
    def make(self, tokenizer: Any, name: str, length: int, count: int) -> Iterator[Any]:
        """Samples 0 … count - 1 of one task and length."""

    def score(self, sample: Sample, answer: str) -> float:
        """The score of a generated answer, from 0 to 1."""
        return METRICS[sample.metric](answer, sample.references)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks that are asked for."""
        return tuple(dict.fromkeys(self.tasks)) or self.TASKS or (self.suite,)

    @property
    def config(self) -> dict[str, Any]:
        """The settings that give the rows their meaning, for config.json."""
        return {
            "suite": self.suite,
            "lengths": list(self.lengths),
            "tasks": list(self.names),
            "samples": self.samples,
            "seed": self.seed,
        }

    def draw(self, tokenizer: Any) -> Iterator[Any]:
        """All samples."""
        for length in self.lengths:
            for name in self.names:
                yield from self.make(tokenizer, name, length, self.samples)

    def check(self, tokenizer: Any) -> None:
        """Raises FarspanError if the shortest length is too short for a task."""
        for name in self.names:
            next(self.make(tokenizer, name, min(self.lengths), 1))


def filled(filling: Filling, sample: Callable[[int], Sample], *, what: str, minimum: int = 1) -> Sample:
    """The sample with as many units as fit its length. Its recipe gets them, and its number of tokens.

    sample: number of units -> the sample. Raises FarspanError if `minimum` units do not fit.
    """
    length = sample(minimum).length
    units = filling.fill(sample, lambda total: fill(total, length, minimum=minimum, what=what))
    made = sample(units)
    return replace(made, recipe={**made.recipe, "units": units, "prompt_tokens": filling.tokens(made)})
