"""`farspan sweep`: many evaluations from one YAML file, by one process or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import launch, options, output


def sweep(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="Grids of models, methods, lengths, tasks.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder of the results [default: the file's own].")
    ] = None,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Evaluate models × storages × methods × budgets × lengths × tasks from a YAML file, and go on.

    Several processes may run the same command at once, on one machine or on several that share the folder:
    each takes the cells (task and length) that no other one has. Under a launcher each rank is such a
    process. A process that is killed loses at most the prompts in flight. The README has an example of
    the file.
    """
    from ..evals.sweep import config as files
    from ..evals.sweep.work import sweep as work

    plan = files.read(config, out)
    place = f"cuda:{launch.local_rank()}" if launch.size() > 1 and device == "cuda" else device

    def load(grid: Any) -> tuple[Any, Any]:
        from ..runtime.models import check_length

        model, tokenizer = options.load_model(grid.model, rope=grid.rope, dtype=grid.dtype, device=place)
        check_length(model, max(grid.task.lengths), what="The longest sample")
        return model, tokenizer

    with output.resumable(json):
        summaries = work(plan, load, (lambda line: None) if json else output.note)
    if json:
        return output.show_json([{"out": str(one.out), **one.data} for one in summaries])
    from ..evals import report

    for one in summaries:
        output.show(report.terminal_table(one.data))
        for sentence in one.data.get("stopped", []):
            output.note(sentence)
        output.note(f"Written to {one.out}: {', '.join(one.files)}")
