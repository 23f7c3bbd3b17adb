"""Work through a sweep: grids in their order, each cell by the process that gets its lock first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..results import Results
from ..run import Summary
from ..setup import Setup
from ..shared import common_settings
from ..task import Cell, Suite, settings
from .config import Grid, Sweep
from .share import Key, Shared, file_name
from .stops import Stops

Load = Callable[[Grid], tuple[Any, Any]]
Say = Callable[[str], None]
_PAUSE = 0.5  # seconds between two looks at cells that other processes work on
_GROWTH = 1.5  # seconds of a row grow with this power of the length, where the length was not measured


def sweep(plan: Sweep, load: Load, say: Say = print) -> list[Summary]:
    """Evaluate what is missing of every grid; returns the summaries of the folders.

    load: the model and the tokenizer of a grid; it is called once for grids of the same model in a row. say:
    is called with a line for each finished cell, with the time left, and for each method that ended early.
    What a grid's folder has is not done again. Several processes may work through the same sweep at once.
    Raises ResultsError for folders of another configuration, before anything is computed in them.
    """
    summaries: dict[Path, Summary] = {}
    loaded: tuple[Any, Any] | None = None
    for number, grid in enumerate(plan.grids):
        before = plan.grids[number - 1] if number else None
        if loaded is None or before is None or _loaded_as(grid) != _loaded_as(before):
            loaded = None  # free the last model before the next one is loaded
            loaded = load(grid)
        work = Work.of(grid, plan.out, loaded, plan.stops, say)
        try:
            work.run()
        except KeyboardInterrupt:
            work.shared.finish()
            raise
        summaries[work.shared.out] = work.shared.finish()
    return list(summaries.values())


def _loaded_as(grid: Grid) -> tuple[str, str, str | None]:
    return grid.model, grid.dtype, grid.rope


@dataclass(frozen=True, kw_only=True)
class Work:
    """A grid with its model, its folder, and what it says."""

    grid: Grid
    setup: Setup
    shared: Shared
    stops: Stops | None
    say: Say

    @classmethod
    def of(cls, grid: Grid, out: Path, loaded: tuple[Any, Any], stops: Stops | None, say: Say) -> Work:
        """The work of a grid under a loaded model and tokenizer."""
        model, tokenizer = loaded
        chosen, config = settings(grid.task, tokenizer, chat=grid.chat, rope=grid.rope)
        setup = Setup(
            model=model,
            tokenizer=chosen,
            methods=grid.methods,
            out=out / grid.folder,
            name=grid.model,
            config=config,
            recipe=grid.recipe,
            storage=grid.storage,
            progress=False,
        )
        common = common_settings(model, chosen, grid.model, grid.methods, grid.recipe, grid.storage)
        shared = Shared(out / grid.folder, {**config, **common}, grid.task)
        return cls(grid=grid, setup=setup, shared=shared, stops=stops, say=say)

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells of the grid."""
        return self.grid.task.cells(self.setup.tokenizer)

    @cached_property
    def methods(self) -> list[str]:
        """The methods that get rows."""
        return self.grid.task.methods(self.grid.methods)

    def run(self) -> None:
        """Evaluate every cell that no other process has, and wait for those that others have."""
        first = [key for cell in self.cells for key in cell.keys(self.stops and self.stops.prompts)]
        session = {"batch_size": self.grid.batch_size, "device": str(self.setup.model.device)}
        self.shared.begin(dict.fromkeys(self.methods, first), session)
        waiting = False
        while left := self._left():
            found = False
            for cell in left:
                with self.shared.cell_lock(file_name(cell)) as mine:
                    # Another process may have finished the cell since the rows were read.
                    if mine and self._missing(cell, self.shared.rows()):
                        self._evaluate(cell)
                        found = True
            if not found:
                if not waiting:
                    self.say(f"{self.grid.folder}: {len(left)} cells are with other processes; waiting.")
                waiting = True
                time.sleep(_PAUSE)

    def _left(self) -> list[Cell]:
        rows = self.shared.rows()
        return [cell for cell in self.cells if self._missing(cell, rows)]

    def _evaluate(self, cell: Cell) -> None:
        task, rows_at_once = self.grid.task, self.grid.batch_size
        folder = self.shared.seed(cell)
        items = list(task.of_cell(self.setup.tokenizer, cell))
        setup = replace(self.setup, out=folder)
        ended: dict[str, str] = {}
        if self.stops is None:
            _answer(task, setup, items, rows_at_once)
        else:
            rows = _answer(task, setup, items[: self.stops.prompts], rows_at_once)
            ended = self.stops.decide(cell, rows)
            going = [method for method in self.grid.methods if method not in ended]
            if going and len(items) > self.stops.prompts:
                _answer(task, replace(setup, methods=going), items, rows_at_once)
        said = list(dict.fromkeys(ended.values()))
        going = [method for method in self.methods if method not in ended]
        self.shared.collect(folder, dict.fromkeys(going, cell.keys()), said)
        for sentence in [*said, self._progress(cell)]:
            self.say(sentence)

    def _missing(self, cell: Cell, rows: Mapping[Key, Mapping[str, Any]]) -> list[Key]:
        """The rows that the cell lacks. Those that its first prompts make useless are not asked for."""
        ended: Mapping[str, str] = {}
        if self.stops is not None:
            keys = set(cell.keys())
            ended = self.stops.decide(cell, [row for (key, _), row in rows.items() if key in keys])
        out = []
        for method in self.methods:
            count = self.stops.prompts if self.stops and method in ended else None
            out += [(key, method) for key in cell.keys(count) if (key, method) not in rows]
        return out

    def _progress(self, cell: Cell) -> str:
        """A line about a finished cell: how many are done, and how long this process would take for the
        rest."""
        rows, cells = self.shared.rows(), self.cells
        missing = {one: self._missing(one, rows) for one in cells}
        done = sum(not left for left in missing.values())
        line = f"{self.grid.folder}: {cell.name} is done, {done} of {len(cells)} cells"
        seconds = seconds_left({one: len(left) for one, left in missing.items()}, rows.values())
        return f"{line}; about {duration(seconds)} left for one process." if done < len(cells) else f"{line}."


def _answer(suite: Suite, setup: Setup, items: Sequence[Any], batch_size: int | str) -> list[dict[str, Any]]:
    """The rows of a working folder after an evaluation into it, without tables and pictures."""
    rows: list[dict[str, Any]] = []

    def keep(results: Results) -> Summary:
        rows[:] = results.rows
        return Summary(out=results.out, data={}, complete=True)

    suite.run(setup, items, batch_size=batch_size, end=keep)
    return rows


def seconds_left(missing: Mapping[Cell, int], rows: Any) -> float:
    """The seconds that the missing rows of each cell take, from the mean of the measured ones of its length,
    or of the nearest length with the difference of length counted."""
    spent: dict[int, list[float]] = {}
    for row in rows:
        if seconds := row.get("seconds"):  # speed has one cell, so nothing is left when it has rows
            spent.setdefault(row["length"], []).append(seconds["prefill"] + seconds["decode"])
    if not spent:
        return 0.0
    means = {length: sum(values) / len(values) for length, values in spent.items()}
    total = 0.0
    for cell, count in missing.items():
        near = min(means, key=lambda length: (abs(length - cell.length), length))
        total += count * means[near] * (cell.length / near) ** _GROWTH
    return total


def duration(seconds: float) -> str:
    """`40 seconds`, `12 minutes` or `3.4 hours`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
