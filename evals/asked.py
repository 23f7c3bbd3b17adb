"""What an evaluation of scored answers asks for: its cells, their samples and the settings that name them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from . import needle, ruler
from .run import ANSWER, AT_DEPTH
from .sample import Sample
from .shape import Shape
from .text import load_prose

RULER, NEEDLE = "ruler", "needle"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Samples of one task and length; of needle also of one depth."""

    suite: str
    task: str
    length: int
    depth: float | None = None

    @property
    def name(self) -> str:
        """`ruler/vt/4096` or `needle/needle/4096/depth=0.5`: the start of its samples' keys."""
        depth = [] if self.depth is None else [f"depth={self.depth:g}"]
        return "/".join([self.suite, self.task, str(self.length), *depth])

    def keys(self, count: int) -> list[str]:
        """The keys of its first samples (as `evals.sample.key` makes them), without drawing them."""
        return [f"{self.name}/{index}" for index in range(count)]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The samples of `farspan eval ruler` or `needle`, with the same settings in config.json.

    tasks: of ruler; "synthetic" are those that need no data set, "all" are all. depths: of needle. samples:
    of each cell. text: as `--text`. chat: False where the chat template is not used.
    """

    suite: str
    lengths: Sequence[int]
    tasks: Sequence[str] = ("synthetic",)
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    seed: int = 1
    text: str | None = None
    rope: str | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.suite not in (RULER, NEEDLE):
            raise FarspanError(f"The suite {self.suite!r} was given; it is {RULER} or {NEEDLE}.")
        if not self.lengths:
            raise FarspanError("No length was given; give at least one, such as 4096.")

    @property
    def shape(self) -> Shape:
        """The shape of its rows."""
        return AT_DEPTH if self.suite == NEEDLE else ANSWER

    @property
    def names(self) -> list[str]:
        """The tasks by their names."""
        return ruler.task_names(list(self.tasks)) if self.suite == RULER else ["needle"]

    def cells(self) -> list[Cell]:
        """Every cell, the lengths in the given order."""
        if self.suite == RULER:
            return [Cell(suite=RULER, task=t, length=n) for n in self.lengths for t in self.names]
        places = [(length, float(depth)) for length in self.lengths for depth in self.depths]
        return [Cell(suite=NEEDLE, task="needle", length=n, depth=depth) for n, depth in places]

    def config(self, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
        """The tokenizer with or without its chat template, and the settings that config.json gets."""
        from ..runtime.models import choose_chat

        chosen = choose_chat(tokenizer, self.chat)
        settings: dict[str, Any] = {"suite": self.suite, "lengths": list(self.lengths), "tasks": self.names}
        if self.suite == NEEDLE:
            settings["depths"] = [float(depth) for depth in self.depths]
        settings |= {"samples": self.samples, "seed": self.seed, "rope": self.rope}
        settings["haystack"] = Path(self.text).name if self.text else "sotu"
        return chosen, settings if chosen is tokenizer else settings | {"chat": False}

    def draw(self, tokenizer: Any, cell: Cell, count: int | None = None) -> Iterator[Sample]:
        """The first samples of a cell. Raises FarspanError as the suite's `make_samples` does."""
        many = self.samples if count is None else count
        if cell.depth is not None:
            prose = load_prose(self.text)
            return needle.make_samples(tokenizer, cell.length, cell.depth, many, self.seed, prose)
        text = load_prose(self.text) if self.text else None  # sotu may be missing where no task needs it
        return ruler.make_samples(tokenizer, cell.task, cell.length, many, self.seed, haystack=text)

    def check(self) -> None:
        """Draw nothing, but raise FarspanError for what no tokenizer could make good."""
        for cell in self.cells():
            self.draw(None, cell)
