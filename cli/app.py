"""The typer app with all commands, and the two commands that print lists: `models` and `methods`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from . import cache, evaluate, launch, options, output
from .calibrate import calibrate, tune
from .convert import convert
from .doctor import doctor
from .gates import import_gates
from .generate import generate
from .inspect import inspect
from .plan import plan
from .report import recommend, report
from .serve import serve
from .sweep import sweep
from .train import train

app = typer.Typer(
    name="farspan",
    help="Make a pretrained causal LM read a long context cheaply, and measure what that costs in quality.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluate.app, name="eval")
app.add_typer(cache.app, name="cache")
app.command()(plan)
app.command()(inspect)
app.command()(report)
app.command()(recommend)
app.command(cls=launch.SpreadCommand)(serve)
app.command()(sweep)
app.command()(doctor)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"farspan {version('farspan')}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def models(json: options.Json = False) -> None:
    """The aliases: models that need no hub, and where they are kept.

    Any hub id, local folder or GGUF file works too.
    """
    from ..runtime.models import ALIASES, cached

    rows: list[dict[str, Any]] = [
        {
            "alias": name,
            "title": alias.title,
            "positions": alias.positions,
            "license": alias.license,
            "source": f"PyPI: {', '.join(part.requirement for part in alias.parts)}",
            "origin": alias.origin,
            "cached": str(folder) if (folder := cached(name)) else None,
        }
        for name, alias in ALIASES.items()
    ]
    if json:
        return output.show_json(rows)
    table = output.Table("alias", "model", "positions", "kept in")
    for row in rows:
        kept = row["cached"] or "fetched on first use"
        table.add_row(
            row["alias"], f"{row['title']}. {row['license']}. {row['origin']}.", str(row["positions"]), kept
        )
    output.show(table)


@app.command()
def methods(
    mixers: Annotated[
        bool, typer.Option("--mixers", help="List the mixers, which take the place of attention, instead.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Every attention method: name, family, paper, parameters and their defaults."""
    from ..attention.spec import methods as registry

    if mixers:
        return _show_mixers(json)

    rows = [_describe(name, cls) for name, cls in registry().items()]
    if json:
        return output.show_json(rows)
    table = output.Table("name", "family", "phases", "paper", "parameters and defaults")
    for row in rows:
        parameters = ", ".join(_with_default(parameter) for parameter in row["parameters"])
        phases, paper = "\n".join(row["phases"]), row["paper"] or "–"
        table.add_row(row["name"], row["family"], phases, paper, parameters or "–")
    output.show(table)
    recipes = output.Table("method", "has a recipe for", "made by")
    for row in rows:
        for model, made in row["recipes"].items():
            recipes.add_row(row["name"], model, made)
    if any(row["recipes"] for row in rows):
        output.show(recipes)


def _show_mixers(json: bool) -> None:
    from ..attention.hybrid import encoder_mixers, mixers
    from ..attention.hybrid.registry import parameters_of

    rows = [
        {
            "name": name,
            "title": cls.title,
            "stands_in": where,
            "paper": cls.paper,
            "summary": (cls.__doc__ or "").strip().partition("\n")[0],
            "parameters": [
                {"name": key, "required": False, "default": one.default}
                for key, one in parameters_of(cls).items()
            ],
        }
        for where, known in (("causal models", mixers()), ("encoders", encoder_mixers()))
        for name, cls in sorted(known.items())
    ]
    if json:
        return output.show_json(rows)
    table = output.Table("name", "stands in", "paper", "parameters and defaults")
    for row in rows:
        parameters = ", ".join(map(_with_default, row["parameters"]))
        table.add_row(row["name"], row["stands_in"], row["paper"] or "–", parameters or "–")
    output.show(table)


def _with_default(parameter: dict[str, Any]) -> str:
    if parameter["required"]:
        return str(parameter["name"])
    default = parameter["default"]
    spelt = str(default).lower() if default is None or isinstance(default, bool) else default
    return f"{parameter['name']}={spelt}"


def _describe(name: str, cls: Any) -> dict[str, Any]:
    from ..attention.spec import parameters_of
    from ..runtime.shipped import recipes_of

    parameters = [
        {
            "name": field.name,
            "type": field.type if isinstance(field.type, str) else field.type.__name__,
            "required": field.default is dataclasses.MISSING,
            "default": None if field.default is dataclasses.MISSING else field.default,
        }
        for field in parameters_of(cls)
    ]
    plain = None if any(parameter["required"] for parameter in parameters) else cls()
    return {
        "name": name,
        "title": cls.title,
        "family": cls.family,
        "paper": cls.paper,
        "phases": sorted(cls.phases, reverse=True),  # prefill, then decode
        "summary": (cls.__doc__ or "").strip().partition("\n")[0],
        "needs_recipe": None if plain is None else plain.needs.recipe,  # with the default parameters
        "recipes": recipes_of(name),
        "lookahead": None if plain is None else str(plain.lookahead),
        "parameters": parameters,
    }


app.command(cls=launch.SpreadCommand)(generate)
app.command()(tune)
app.command()(calibrate)
app.command()(import_gates)
app.command()(train)
app.command()(convert)
