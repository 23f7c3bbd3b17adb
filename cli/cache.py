"""`farspan cache build`: read a long prompt once, and keep what attention needs of it in a folder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..attention.errors import FarspanError
from . import launch, options, output
from .storage import Storage

app = typer.Typer(help="Prompts that are read once and kept in a folder.", no_args_is_help=True)


@dataclass(frozen=True, kw_only=True)
class Build:
    """Options of `farspan cache build`."""

    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache.")]
    model: options.Model = options.DEFAULT_MODEL
    method: Annotated[
        str, typer.Option("--method", "--methods", help="What attention reads, as for `farspan generate`.")
    ] = "dense"
    source: options.Prompt
    chat: options.Chat = None
    prefill_chunk: Annotated[int | None, options.tokens("Read the prompt in chunks of this many tokens.")] = (
        None
    )
    storage: Storage = None
    recipe: options.Recipe = None
    rope: options.Rope = None
    on: options.Place
    json: options.Json = False


@app.callback()
def _group() -> None:
    """Prompts that are read once and kept in a folder."""


@app.command()
@options.command
def build(given: Build) -> None:
    """Read a text, such as a book, and save its cache for `farspan generate --cache`.

    The cache belongs to the model, the tokenizer, the method and the format (--storage int8). A cache
    that is in the folder is replaced.
    """
    if launch.size() > 1:
        raise FarspanError(
            f"A saved cache is that of one process, and a launcher has started {launch.size()} ranks: run "
            "farspan cache build without a launcher."
        )
    text = given.source.read()
    options.one_method(given.method)
    from ..runtime.writable import check_writable

    check_writable(given.out, "give another --out")
    from ..runtime.models import check_length, encode_prefix

    model, tokenizer = given.on.load(given.model, given.rope)
    ids = encode_prefix(tokenizer, text, chat=given.chat).to(model.device)
    check_length(model, ids.shape[1])
    from ..runtime.hf import fill, stored_bytes
    from ..runtime.patch import patch
    from ..runtime.saved import save_cache

    how: dict[str, Any] = {
        "recipe": given.recipe,
        "prefill_chunk": given.prefill_chunk,
        "storage": given.storage,
    }
    with patch(model, given.method, **how):
        began = time.perf_counter()
        cache = fill(model, ids, ids.new_ones(ids.shape))
        seconds = time.perf_counter() - began
        settings = {"text": text, "chat": given.chat, "model": given.model}
        save_cache(model, cache, ids, given.out, tokenizer=tokenizer, settings=settings)
    about = {
        "out": str(given.out),
        "model": given.model,
        "method": given.method,
        "tokens": ids.shape[1],
        "bytes": stored_bytes(cache),
        "seconds": seconds,
    }
    if given.json:
        return output.show_json(about)
    output.note(
        f"{about['tokens']} tokens read in {seconds:.1f} s; {about['bytes'] / 1e6:.0f} MB are in "
        f"{given.out}. Ask about them with: farspan generate --model {given.model} --cache {given.out} "
        "--prompt QUESTION"
    )
