"""`farspan serve`: a patched model behind OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from . import amounts, launch, options, output
from .storage import Storage


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Options of `farspan serve`."""

    model: options.Model = options.DEFAULT_MODEL
    method: Annotated[str, typer.Option(help="What attention reads; see `farspan methods`.")] = "dense"
    storage: Storage = None
    prefill_chunk: Annotated[int | None, options.tokens("Read prompts in chunks of this many tokens.")] = None
    static: Annotated[
        int | None,
        options.tokens("Caches of this many positions; on CUDA, decode in a captured graph."),
    ] = None
    recipe: options.Recipe = None
    rope: options.Rope = None
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than this machine's need a key.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0: a free one.")] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FARSPAN_API_KEY",
            show_envvar=True,
            help="What clients must send as 'Authorization: Bearer KEY'. Other users of this machine can "
            "see an option, but not the variable.",
        ),
    ] = None
    queue: Annotated[int, options.count("How many requests may wait; a further one gets status 429.")] = 64
    prefix_memory: Annotated[
        str,
        typer.Option(
            help='Memory for the caches of earlier prompts, such as 2G, on each rank; "0": read every prompt '
            "whole."
        ),
    ] = "2G"
    on: options.Ranks


@options.command
def serve(given: Serve) -> None:
    """Serve a patched model to OpenAI's clients, until Ctrl-C: /v1/chat/completions, /v1/completions,
    /v1/responses, /v1/models, /health and /metrics (Prometheus).

    One request runs at a time, and the others wait. A prompt that begins as an earlier one did is read from
    where the two differ; `usage` counts these tokens as cached. The server is that of transformers, whose
    packages `pip install 'farspan[serving]'` installs. Under a launcher, as in
    `torchrun --nproc-per-node 2 -m farspan serve ...`, rank 0 serves, and each prompt and its cache are
    spread over the ranks.
    """
    ranks = given.on.spread()
    options.one_method(given.method)  # a misspelt method ends here, before the model is loaded
    from ..runtime.patch import patch
    from ..runtime.patched import Patched
    from ..runtime.prefixes import PrefixStore
    from ..runtime.serving.answers import follow
    from ..runtime.serving.server import Server
    from ..runtime.serving.where import Where

    limit = 0 if given.prefix_memory == "0" else amounts.size(given.prefix_memory, "--prefix-memory")
    prefixes = PrefixStore(limit) if limit else None

    def load() -> tuple[Any, Any, Patched]:
        model, tokenizer = given.on.load(given.model, given.rope, ranks)
        patched = patch(
            model,
            given.method,
            storage=given.storage,
            prefill_chunk=given.prefill_chunk,
            static=given.static,
            recipe=given.recipe,
            parallel=ranks,
        )
        return model, tokenizer, patched

    if launch.size() > 1 and not launch.leads():
        follow(*load(), prefixes)
        return
    server = Server(
        given.model,
        load,
        Where(host=given.host, port=given.port, api_key=given.api_key),
        queue=given.queue,
        prefixes=prefixes,
    )
    output.note(f"Listening on {server.url}; the model is being loaded.")
    server.run()
