"""`farspan import-gates` turns SeerAttention's published gates into a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from . import launch, options, output


@dataclass(frozen=True, kw_only=True)
class ImportGates:
    """Options of `farspan import-gates`."""

    path: Annotated[
        Path, typer.Argument(help="A folder with attn_gate_weights.pth, or a .pth or .safetensors file.")
    ]
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the recipe is saved.")]
    model: options.Model = options.DEFAULT_MODEL
    on: options.Place


@options.command
def import_gates(given: ImportGates) -> None:
    """Save SeerAttention's published gates (AttnGates) as a recipe of seer or seer_decode.

    Under a launcher, rank 0 does the work alone.
    """
    launch.only_rank_0()
    from ..runtime.writable import check_writable

    check_writable(given.out, "give another --out")
    causal_lm, _ = given.on.load(given.model)
    from ..runtime.attn_gates import convert_attn_gates

    recipe = convert_attn_gates(given.path, causal_lm)
    recipe.save(given.out)
    output.note(f"Saved the recipe of {recipe.method} to {given.out}; use it with --recipe {given.out}.")
