"""`farspan doctor`: versions and devices, which implementation each operation takes, and whether a patched
model computes what the model alone does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from . import launch, options, output


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Options of `farspan doctor`."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Try this model's class, by its config; an alias is fetched first [default: small Llama].",
        ),
    ] = None
    dtype: Annotated[
        str,
        options.dtype(
            'Of the heads in the list of implementations: "auto" (bf16 if the GPU has it) or a type.'
        ),
    ] = "auto"
    head_dim: Annotated[
        int, typer.Option(min=2, max=1024, help="The heads' size in the list of implementations.")
    ] = 128
    json: options.Json = False


@options.command
def doctor(given: Doctor) -> None:
    """Show versions, tested releases and devices, and run a small model with and without farspan.

    It also lists which implementation each operation takes on this machine, and why it does not take the
    others. The small model has random weights and the class of `--model`; its logits and its `generate` must
    be the same with and without a dense patch. Exit code 0 if all is well, else 1 with one sentence on
    stderr.
    """
    launch.only_rank_0()
    from ..runtime.doctor import examine
    from ..runtime.implementations import why_not

    found = examine(given.model, dtype=given.dtype, head_dim=given.head_dim)
    if given.json:
        output.show_json(found)
    else:
        table = output.Table("what", "found", "needed or tested")
        table.add_row("farspan", found["farspan"], "")
        table.add_row("python", found["python"], "")
        for package in found["packages"]:
            needed = package["needed"]
            if package["name"] == "transformers":
                needed += f" (tested: {', '.join(found['transformers_tested'])})"
            table.add_row(package["name"], package["version"] or "missing", needed)
        for device in found["devices"]:
            cores = f", {device['cores']} cores" if device["cores"] else ""
            memory = f", {device['bytes'] / 2**30:.0f} GiB" if device["bytes"] else ""
            table.add_row(device["device"], f"{device['name']}{cores}{memory}", "")
        table.add_row("cache folder", found["cache_folder"], "")
        trial = found["trial"]
        passed = "failed" if trial["faults"] else "the same logits and tokens with and without farspan"
        table.add_row("trial", f"{trial['model']}: {passed} ({trial['seconds']:.1f} s)", "")
        output.show(table)
        asked = found["implementations"]
        heads = f"{asked['dtype']}, heads of {asked['head_dim']}, on {asked['device']}"
        table = output.Table("operation", f"taken for {heads}")
        for one in asked["operations"]:
            table.add_row(one["op"], one["auto"])
        output.show(table)
        table = output.Table("not taken", "for", "because")
        for row in why_not(asked["operations"]):
            table.add_row(*row)
        output.show(table)
    if found["faults"]:
        output.fail(f"{'; '.join(found['faults'])}.")
        raise typer.Exit(1)
