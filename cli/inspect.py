"""`farspan inspect`: pictures of what a method reads and of the attention that it misses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import launch, options, output


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Options of `farspan inspect`."""

    method: Annotated[str, typer.Option(help="What the prefill reads; see `farspan methods`.")]
    model: options.Model = options.DEFAULT_MODEL
    source: options.Prompt
    layers: Annotated[
        list[str] | None, typer.Option(help="Layers to draw, such as 0,5,11 [default: 4, evenly spread].")
    ] = None
    heads: Annotated[
        list[str] | None, typer.Option(help="Query heads to draw [default: 6, evenly spread].")
    ] = None
    block: Annotated[int, options.tokens("Side of a square of the picture, in tokens.")] = 64
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the pictures, the page and the numbers.")
    ] = Path("inspect-out")
    chat: options.Chat = None
    recipe: options.Recipe = None
    rope: options.Rope = None
    on: options.Place
    json: options.Json = False


@options.command
def inspect(given: Inspect) -> None:
    """Draw what a method's prefill reads over the true attention, and print how much of it was read.

    It writes one PNG per layer, with a panel per head, and one HTML page that holds everything. It prints a
    table of every layer: density, recall of attention mass, cost of the selection. docs/INSPECT.md explains
    them. Under a launcher, rank 0 does the work alone.
    """
    launch.only_rank_0()
    text = given.source.read()
    drawn: dict[str, Any] = {
        "layers": _numbers(given.layers, "--layers"),
        "heads": _numbers(given.heads, "--heads"),
    }
    options.one_method(given.method)  # a misspelt method ends here, before the model is loaded
    from ..evals import inspect as files

    files.check(given.out)
    from ..runtime.inspect import inspect as run
    from ..runtime.models import check_length, encode_prompt

    causal_lm, tokenizer = given.on.load(given.model, given.rope)
    ids = encode_prompt(tokenizer, text, chat=given.chat)
    check_length(causal_lm, ids.shape[1])
    found = run(causal_lm, ids, given.method, block=given.block, recipe=given.recipe, **drawn)
    data = files.numbers(found, given.model)
    written = files.write(found, data, given.out)
    if given.json:
        return output.show_json(data | {"files": [str(path) for path in written]})
    shown = output.Table(
        *files.COLUMNS, title=f"{found.method} on {given.model}, {found.length} tokens", numbers_from=1
    )
    *lines, total = files.table(data)
    for line in lines:
        shown.add_row(*line)
    shown.add_section()
    shown.add_row(*total)
    output.show(shown)
    for reason, count in data["fallbacks"].items():
        output.note(f"Read everything in {count} layer calls: {reason}.")
    output.note(f"The pictures are in {given.out / files.PAGE}, and one by one beside it.")


def _numbers(values: list[str] | None, option: str) -> list[int] | None:
    """Numbers from 0 of a repeated option, each value of which may hold several."""
    if values is None:
        return None
    items = options.split_list(values)
    for item in items:
        if not item.isdecimal():
            raise FarspanError(f"{option} takes whole numbers from 0 on, such as 0,5,11; got {item!r}.")
    return [int(item) for item in items]
