"""A server on a socket: it listens at once, loads its model meanwhile, and stops with one sentence if it
cannot."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...attention.errors import FarspanError
from ..hf.serving import internals
from ..patched import Patched
from .answers import Answers, Prefixes

logger = logging.getLogger("farspan")

_GRACE = 5  # seconds that running requests have to end when the server is stopped


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a server listens, and to whom. port: 0 takes a free one. api_key: what every request must
    bring."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.isprintable():
            raise FarspanError(
                "The API key has characters that no HTTP header can carry; choose another one."
            )
        if self.api_key is None and not self.local:
            raise FarspanError(
                f"--host {self.host} lets other machines in, which needs an API key: set FARSPAN_API_KEY, "
                "give --api-key, or listen on 127.0.0.1."
            )

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def bound(self) -> socket.socket:
        """A socket that is bound to it. Raises FarspanError where that is not possible."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            bound = socket.socket(family, kind, protocol)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FarspanError(
                f"The server cannot listen on {self.host}, port {self.port} ({reason}): give another "
                "--port or --host."
            ) from None
        return bound


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
        prefixes: Prefixes | None = None,
    ) -> None:
        internals.check()
        import uvicorn

        from ..hf.serving.app import make_app
        from ..hf.serving.manager import OneModel
        from .engine import Engine
        from .metrics import Metrics

        internals.quiet()
        self._socket = where.bound()
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
        if answers.ranks is not None:
            logger.info("Prefixes are not reused over ranks.")
        elif self._prefixes is not None and (why := patched.cuts.never):
            logger.info("Prefixes are not reused: %s.", why)

    def _failed(self, error: Exception) -> None:
        self._error = error
        self.stop()
