"""`farspan.evaluate`: the evaluations of the command for a model in memory, with a result to work on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.models import check_length
from .folders import RULER, Found, read_folders
from .recommend import Recommendation, recommend
from .report import terminal_table
from .setup import Setup
from .suites import options_of, suite_of
from .task import Suite, settings


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
        return str(terminal_table(self.summary).text(100))


def evaluate(
    model: Any,
    tokenizer: Any,
    methods: Sequence[str],
    *,
    suite: str | Suite = RULER,
    tasks: Sequence[str] = (),
    lengths: Sequence[int] = (4096,),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 20,
    seed: int = 1,
    text: str | None = None,
    qa_data: Sequence[str | Path] = (),
    prompts: Sequence[str] = (),
    chat: bool | None = None,
    recipe: str | Path | None = None,
    storage: str | None = None,
    batch_size: int | str = "auto",
    new_tokens: int = 64,
    repeats: int = 3,
    out: str | Path | None = None,
    name: str | None = None,
    progress: bool = True,
) -> Evaluated:
    """Evaluate methods on a loaded model, as `farspan eval` does; keep "dense" among them to compare with.

    suite: "ruler", "needle", "retrieval", "turns", "fidelity", "ppl" or "speed"; or a
    `farspan.evals.task.Task`, such as one of your own, whose lengths, samples and seed count then. tasks:
    names of the suite's tasks; without any, the command's default. lengths: tokens. samples: prompts of each
    task and length (of "ppl": windows). depths: of "needle". prompts: the texts of "fidelity". new_tokens: of
    "fidelity", "ppl" and "speed"; repeats: of "speed". text, qa_data, chat, recipe, storage,
    batch_size: as the command's options. out: the folder, resumed if it is there; None makes a temporary one.
    name: what reports call the model.
    Raises FarspanError for arguments that do not fit, before anything is computed.
    """
    if not isinstance(suite, Suite):
        own = options_of(suite)
        given: dict[str, Any] = {
            "tasks": tasks or None,
            "lengths": lengths,
            "depths": depths,
            "samples": samples,
            "seed": seed,
            "text": text,
            "qa_data": qa_data,
            "prompts": prompts,
            "batch_size": 1 if batch_size == "auto" else batch_size,
            "new_tokens": new_tokens,
            "repeats": repeats,
        }
        suite = suite_of(suite, **{option: value for option, value in given.items() if option in own})
    called = name or getattr(model.config, "name_or_path", "") or type(model).__name__
    chosen, config = settings(suite, tokenizer, chat=chat)
    check_length(model, suite.longest(chosen), what="The longest sample")
    suite.check(chosen)
    setup = Setup(
        model=model,
        tokenizer=chosen,
        methods=methods,
        out=Path(tempfile.mkdtemp(prefix="farspan-")) if out is None else Path(out),
        name=Path(called).name,
        config=config,
        recipe=recipe,
        storage=storage,
        progress=progress,
    )
    summary = suite.run(setup, suite.draw(chosen), batch_size=batch_size)
    return Evaluated(out=summary.out, summary=summary.data, complete=summary.complete)
