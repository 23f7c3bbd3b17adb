"""What an evaluation asks: a suite has cells of items, and says how they become rows; a task is a suite that
makes samples and scores answers.

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
    task.run(setup, task.draw(tokenizer))

It is run, resumed, summarised and shown as the others are (see run.py). `farspan.evaluate(..., suite=task)`
does it in one call. `examples/own_task.py` is a whole one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..attention.errors import FarspanError
from .results import Results
from .run import ANSWER, Summary, finish
from .run import run as run_samples
from .sample import METRICS, Sample, check_numbers, fill
from .setup import Setup, with_chat
from .shape import Shape
from .tokens import Filling


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Items that one process of a sweep evaluates: those of one task and length; of needle also of one depth.

    items: the keys of the rows of each item under a method.
    """

    suite: str
    task: str
    length: int
    depth: float | None = None
    items: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        """`ruler/vt/4096` or `needle/needle/4096/depth=0.5`: the start of its samples' keys."""
        depth = [] if self.depth is None else [f"depth={self.depth:g}"]
        return "/".join([self.suite, self.task, str(self.length), *depth])

    def numbered(self, count: int) -> Cell:
        """The cell with `count` items of one row each, with the keys that `evals.sample.key` makes."""
        return replace(self, items=tuple((f"{self.name}/{index}",) for index in range(count)))

    def keys(self, count: int | None = None) -> list[str]:
        """The keys of its first items; of all of them by default."""
        return [key for item in self.items[:count] for key in item]


class Suite(ABC):
    """What a sweep, a command and `farspan.evaluate` need to know of an evaluation."""

    suite: ClassVar[str]
    """The name of the suite, in rows, keys and files."""
    SHAPE: ClassVar[Shape] = ANSWER
    """The shape of its rows."""
    shortens: ClassVar[bool] = False
    """Whether its methods may shorten prompts (see compressed.py)."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The settings that give the rows their meaning, for config.json."""

    @property
    def chats(self) -> bool:
        """Whether its prompts are in the tokenizer's chat format."""
        return True

    @abstractmethod
    def longest(self, tokenizer: Any) -> int:
        """The most tokens of a prompt with its answer."""

    @abstractmethod
    def cells(self, tokenizer: Any) -> list[Cell]:
        """Every cell, the lengths in the given order. Nothing is drawn for it."""

    @abstractmethod
    def of_cell(self, tokenizer: Any, cell: Cell) -> Iterator[Any]:
        """All items of a cell."""

    def draw(self, tokenizer: Any) -> Iterator[Any]:
        """All items."""
        for cell in self.cells(tokenizer):
            yield from self.of_cell(tokenizer, cell)

    def check(self, tokenizer: Any) -> None:
        """Raises FarspanError for items that cannot be drawn, before a folder is made."""
        for _ in self.draw(tokenizer):
            pass

    def methods(self, specs: Sequence[str]) -> list[str]:
        """The methods that get rows, which may be more than those asked for."""
        return list(specs)

    @abstractmethod
    def run(
        self,
        setup: Setup,
        items: Iterable[Any],
        *,
        batch_size: int | str = "auto",
        end: Callable[[Results], Summary] | None = None,
    ) -> Summary:
        """Evaluate every method of the setup on items of this suite (see `run.drive`)."""

    def finish(self, results: Results) -> Summary:
        """Write the summary and the tables of a folder of this suite."""
        return finish(results)


@dataclass(frozen=True, kw_only=True)
class Task(Suite):
    """Samples for `tasks` (names that `TASKS` allows) at `lengths` tokens of prompt and answer.

    samples: how many for each cell. The same seed gives the same samples.
    Raises FarspanError for wrong numbers and for an unknown name.
    """

    TASKS: ClassVar[tuple[str, ...]] = ()
    """The names that `tasks` may have; empty: one task that is called like the suite."""
    shortens: ClassVar[bool] = True

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
        return {
            "suite": self.suite,
            "lengths": list(self.lengths),
            "tasks": list(self.names),
            "samples": self.samples,
            "seed": self.seed,
        }

    def longest(self, tokenizer: Any) -> int:
        return max(self.lengths)

    def cells(self, tokenizer: Any) -> list[Cell]:
        return [
            Cell(suite=self.suite, task=name, length=length).numbered(self.samples)
            for length in self.lengths
            for name in self.names
        ]

    def of_cell(self, tokenizer: Any, cell: Cell) -> Iterator[Any]:
        return self.make(tokenizer, cell.task, cell.length, self.samples)

    def run(
        self,
        setup: Setup,
        items: Iterable[Any],
        *,
        batch_size: int | str = "auto",
        end: Callable[[Results], Summary] | None = None,
    ) -> Summary:
        return run_samples(setup, items, batch_size=batch_size, score=self.score, end=end)

    def check(self, tokenizer: Any) -> None:
        """Raises FarspanError if the shortest length is too short for a task."""
        for name in self.names:
            next(self.make(tokenizer, name, min(self.lengths), 1))


def settings(
    suite: Suite, tokenizer: Any, *, chat: bool | None = None, rope: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with or without its chat format, and the settings that config.json gets."""
    chosen, plain = with_chat(tokenizer, chat) if suite.chats else (tokenizer, {})
    return chosen, {**suite.config, "rope": rope, **plain}


def filled(filling: Filling, sample: Callable[[int], Sample], *, what: str, minimum: int = 1) -> Sample:
    """The sample with as many units as fit its length. Its recipe gets them, and its number of tokens.

    sample: number of units -> the sample. Raises FarspanError if `minimum` units do not fit.
    """
    length = sample(minimum).length
    units = filling.fill(sample, lambda total: fill(total, length, minimum=minimum, what=what))
    made = sample(units)
    return replace(made, recipe={**made.recipe, "units": units, "prompt_tokens": filling.tokens(made)})
