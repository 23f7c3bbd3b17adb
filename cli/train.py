"""`farspan train` learns a method's weights on a text, on a frozen model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from . import launch, options, output


@dataclass(frozen=True, kw_only=True)
class Train:
    """Options of `farspan train`."""

    method: Annotated[
        str,
        typer.Argument(
            help="The method whose weights are trained, such as seer; or an encoder of passages, "
            "retriever or hierarchical."
        ),
    ]
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the checkpoints and the recipe are saved.")]
    text: options.Text
    model: options.Model = options.DEFAULT_MODEL
    steps: Annotated[int, options.count("Steps of the optimizer.")] = 200
    window: Annotated[int, options.tokens("Tokens of one window.")] = 4096
    windows: options.Windows = None
    keep: Annotated[
        int | None,
        options.memory("Memory for what gates observe of windows that come again [default: 16G]."),
    ] = None
    batch: Annotated[int, options.count("Windows of one step, over all processes.")] = 1
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate [default: 1e-3; 2e-2 for duo, 1e-4 with --tune lora, 2e-5 with "
            "attention]."
        ),
    ] = None
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the highest learning rate.")] = 20
    held_out: options.HeldOut = 4
    save_every: Annotated[int, options.count("Steps between checkpoints.")] = 20
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of windows.")] = 0
    precision: Annotated[str, typer.Option(help='accelerate\'s mixed precision: "no", "bf16" or "fp16".')] = (
        "no"
    )
    start: Annotated[Path | None, typer.Option(help="A recipe whose weights training begins with.")] = None
    half: Annotated[bool, typer.Option("--half", help="Save the recipe in float16, half the size.")] = False
    tune: Annotated[
        str | None,
        typer.Option(
            help='"lora" or "attention": fine-tune adapters of the attention, or its projections, while the '
            "method runs [default: train the method's gate on the frozen model]."
        ),
    ] = None
    rank: Annotated[int | None, typer.Option(help="--tune lora: rank of the adapters [default: 8].")] = None
    alpha: Annotated[
        float | None, typer.Option(help="--tune lora: the adapters count alpha / rank times [default: 16].")
    ] = None
    loss: Annotated[
        str | None,
        typer.Option(help='--tune: "kl" to the dense model, or "nll" of the text [default: kl].'),
    ] = None
    temperature: Annotated[
        float | None, typer.Option(help="--tune: of both predictions in the kl loss [default: 1].")
    ] = None
    rope: options.Rope = None
    on: options.Place

    def settings(self) -> dict[str, Any]:
        """The options of `farspan.train`; those that were not given are left out."""
        own = vars(self).items()
        apart = ("method", "text", "model", "rope", "on")
        return {name: value for name, value in own if name not in apart and value is not None}


@options.command
def train(given: Train) -> None:
    """Train a method's weights on text you name, on the frozen model, and save the recipe.

    "retriever" and "hierarchical" are encoders of passages, for --compress of `farspan generate`.

    The same command goes on where it was stopped. Under torchrun, the windows of a step are spread over the
    ranks.
    """
    from ..runtime.writable import check_writable

    check_writable(given.out, "give another --out")
    from ..runtime.compress.encoders import names_encoder

    encodes = names_encoder(given.method)
    if not encodes:
        options.one_method(given.method)
    prose = options.read_prose(given.text)
    spread = "data" if launch.size() > 1 else None  # then each rank has a device of its own
    causal_lm, tokenizer = given.on.load(given.model, given.rope, spread)
    from ..runtime.train import train as run

    with output.training_progress() as advance:
        recipe = run(causal_lm, tokenizer, given.method, prose, progress=advance, **given.settings())
    before, after = recipe.settings["held_out"][0], recipe.settings["held_out"][-1]
    table = output.Table("held-out text", "before", "after")
    for name in after:
        table.add_row(name, f"{before[name]:.4f}", f"{after[name]:.4f}")
    output.show(table)
    use = f"farspan generate --compress 0.3 --scorer {given.out}" if encodes else f"--recipe {given.out}"
    output.note(f"Saved the recipe to {given.out}; use it with {use}.")
