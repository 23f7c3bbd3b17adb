"""A server on a socket: it listens at once, loads its model meanwhile, and stops with one sentence if it
cannot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from ...attention.errors import FarspanError
from ..hf.serving import internals
from ..patched import Patched
from ..prefixes import PrefixStore
from .answers import Answers
from .where import Where

logger = logging.getLogger("farspan")

_GRACE = 5  # seconds that running requests have to end when the server is stopped


class Server:
    """transformers' server with one patched model.

    name: what clients call the model. load: returns (model, tokenizer, its patch); it is called in the thread
    that runs the model. queue: how many requests may wait. prefixes: keeps the caches of prompts.

    Raises FarspanError without the packages of the extra [serving] or where it cannot listen, and Unsupported
    for a release of transformers with another server."""

    def __init__(
        self,
        name: str,
        load: Callable[[], tuple[Any, Any, Patched]],
        where: Where,
        *,
        queue: int = 64,
        prefixes: PrefixStore | None = None,
    ) -> None:
        internals.check()
        import uvicorn

        from ..hf.serving.app import make_app
        from ..hf.serving.manager import OneModel
        from .engine import Engine
        from .metrics import Metrics

        internals.quiet()
        self._socket = where.listening()
        self.port = int(self._socket.getsockname()[1])
        host = f"[{where.host}]" if ":" in where.host else where.host
        self.url = f"http://{host}:{self.port}/v1"
        self.engine = Engine(queue)
        self.metrics = Metrics(lambda: self.engine.waiting, lambda: self.engine.running is not None)
        self._models = OneModel(name, self.engine)
        self._load, self._prefixes = partial(self._loaded, load), prefixes
        self._error: Exception | None = None
        app = make_app(self._models, self.engine, self.metrics, where.api_key)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE, server_header=False
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until ``stop``, or a signal where this is the main thread. Raises what loading the model has
        raised."""
        self.engine.start(self._load, lambda: logger.info("Ready at %s", self.url), self._failed)
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.engine.stop()
            self._socket.close()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End ``run``; requests that run have some seconds to end."""
        self._server.should_exit = True

    def _loaded(self, load: Callable[[], tuple[Any, Any, Patched]]) -> None:
        model, tokenizer, patched = load()
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise FarspanError(
                f"{type(tokenizer).__name__} cannot stream tokens, which a server needs: use a model with a "
                "tokenizer.json."
            )
        answers = Answers(model, tokenizer, patched, self.metrics, self._prefixes)
        self.engine.idle, self.engine.end = answers.idle, answers.end
        self._models.put(answers)
        if self._prefixes is not None and (why := answers.cuts.never):
            logger.info("Prefixes are not reused: %s.", why)

    def _failed(self, error: Exception) -> None:
        self._error = error
        self.stop()
