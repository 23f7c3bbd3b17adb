"""`farspan convert` replaces attention layers of a model by mixers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options, output


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Options of `farspan convert`."""

    mixer: Annotated[str, typer.Option(help="The mixer and its parameters, such as gated_linear:window=64.")]
    out: Annotated[Path, typer.Option("--out", "-o", help="The new folder of the converted model.")]
    text: options.Text
    model: options.Model = options.DEFAULT_MODEL
    attention_layers: Annotated[
        str,
        typer.Option(
            help='Which layers keep attention: "auto:N", the N that are needed most by measurement; '
            '"even:N"; or numbers such as 0,8,16.'
        ),
    ] = "auto:8"
    steps_align: Annotated[int, options.count("Steps of stage 1, layer by layer.")] = 200
    steps_heal: Annotated[
        int, typer.Option("--steps-heal", "--steps-distil", min=1, help="Steps of stage 2, end to end.")
    ] = 400
    window: Annotated[int, options.tokens("Tokens of one window.")] = 512
    windows: options.Windows = None
    batch: Annotated[int, options.count("Windows of one step.")] = 1
    lr_align: Annotated[float, typer.Option(help="Highest learning rate of stage 1.")] = 1e-3
    lr: Annotated[float, typer.Option(help="Highest learning rate of stage 2.")] = 3e-4
    train: Annotated[
        str, typer.Option(help='What stage 2 changes: "mixers", or "all" weights of the decoder\'s layers.')
    ] = "mixers"
    cross_entropy: Annotated[
        float, typer.Option(help="Weight of the text's own loss in stage 2, beside the distillation.")
    ] = 0.0
    held_out: options.HeldOut = 4
    save_every: Annotated[int, options.count("Steps between checkpoints.")] = 50
    seed: Annotated[int, typer.Option(help="Of new weights, of the order of windows, and of the probe.")] = 0
    precision: Annotated[str, typer.Option(help='"no", "bf16", "fp16", or "auto": the model\'s dtype.')] = (
        "auto"
    )
    aligned: Annotated[
        Path | None,
        typer.Option(help="Use stage 1 and the measurements of this conversion, which was made with --keep."),
    ] = None
    keep: Annotated[bool, typer.Option("--keep", help="Leave the checkpoints in OUT/conversion.")] = False
    on: options.Place

    def settings(self) -> dict[str, Any]:
        """The options of `farspan.convert`."""
        return {name: x for name, x in vars(self).items() if name not in ("mixer", "text", "model", "on")}


@options.command
def convert(given: Convert) -> None:
    """Replace attention layers of a model by mixers, and heal it by distillation on text you name.

    The result is a folder for `farspan.load` and every --model option. The same command goes on where it was
    stopped. README.md in the folder says what was measured, and nothing else is claimed.
    """
    from ..attention.hybrid import Geometry, parse_mixer
    from ..runtime.convert import check_folder
    from ..runtime.convert import convert as run

    check_folder(given.out)
    parse_mixer(given.mixer, Geometry(hidden_size=1024, num_heads=16, num_kv_heads=4, head_dim=64))
    prose = options.read_prose(given.text)
    causal_lm, tokenizer = given.on.load(given.model, None, None)
    tokenizer.model_max_length = int(1e30)  # the text is cut into windows
    titles = {"align": "stage 1", "choose": "measuring layers", "heal": "stage 2"}
    stage = ""
    with output.training_progress() as advance:

        def watch(name: str, step: Any) -> None:
            nonlocal stage
            if name != stage:
                stage = name
                output.note(f"{titles[name]}: {step.total} {'layers' if name == 'choose' else 'steps'}")
            if name != "choose":
                advance(step)
            elif step.done % max(step.total // 10, 1) == 0:
                output.note(f"{step.done} of {step.total} layers measured")

        report = run(
            causal_lm, tokenizer, given.mixer, prose, progress=watch, chosen=_show_choice, **given.settings()
        )
    _show(report)
    output.note(f"Saved the converted model to {given.out}; load it with --model {given.out}.")


def _show_choice(measured: list[Any], kept: list[int]) -> None:
    table = output.Table(
        "layer replaced alone", "output error", "loss", "KL", "retrieval loss", "need", "", numbers_from=0
    )
    for m in sorted(measured, key=lambda m: -m.need):
        table.add_row(
            str(m.layer),
            f"{m.error:.3f}",
            f"{m.nll:+.4f}",
            f"{m.kl:.4f}",
            f"{m.retrieval:+.3f}",
            f"{100 * m.need:.1f} %",
            "stays" if m.layer in kept else "replaced",
        )
    output.show(table)


def _show(report: dict[str, Any]) -> None:
    from ..runtime.conversion.card import break_even, measures

    table = output.Table("", "perplexity", "KL to the original", "loss of values to look up", numbers_from=1)
    for name, perplexity, kl, looked_up in measures(report):
        table.add_row(name, f"{perplexity:.2f}", f"{kl:.4f}", f"{looked_up:.3f}")
    output.show(table)
    size = report["memory"]
    output.show_text(
        f"{len(report['replaced'])} of {report['layers']} layers have {report['mixer']}. KV cache: "
        f"{size['kv_bytes_per_token_after']:,} bytes a token, before {size['kv_bytes_per_token_before']:,}; "
        f"states: {size['state_bytes']:,} bytes a sequence. {break_even(size)}"
    )
