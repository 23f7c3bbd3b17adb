"""The web application: transformers' routes, ours beside them, and what stands before all of them."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from transformers.cli.serving.server import build_server

from ...serving.engine import Engine, Refused
from ...serving.metrics import Metrics
from ...serving.where import is_local
from .exchange import Exchange, current
from .handlers import Chat, Completion, Responses
from .manager import EngineManager, OneModel, OneState

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_OURS = ("/health", "/metrics")
_KEPT = (*ENDPOINTS, "/v1/models")
_LARGEST = 64 * 2**20  # bytes of a body
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_denied_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def make_app(models: OneModel, engine: Engine, metrics: Metrics, api_key: str | None) -> Front:
    """The application that uvicorn runs."""
    state = OneState(EngineManager(engine, models, metrics))
    app: FastAPI = build_server(
        model_manager=models,
        chat_handler=Chat(models, state),
        completion_handler=Completion(models, state),
        response_handler=Responses(models, state),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in _KEPT]

    @app.get("/health")
    async def health() -> JSONResponse:
        engine.check()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def values() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(Refused)
    async def refused(_: Any, error: Refused) -> JSONResponse:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def http(request: Any, error: HTTPException) -> JSONResponse:
        if error.status_code == 404 and error.detail == "Not Found":
            served = ", ".join((*_KEPT, *_OURS))
            return answer(Refused(404, f"There is no {request.url.path} here; this server has {served}."))
        if error.status_code == 405:
            return answer(Refused(405, f"{request.url.path} does not take {request.method}."))
        return answer(Refused(error.status_code, f"{str(error.detail).rstrip('.')}."))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Any, error: RequestValidationError) -> JSONResponse:
        if "json" not in request.headers.get("content-type", ""):
            return answer(
                Refused(400, "Send the body as JSON, with the header 'Content-Type: application/json'.")
            )
        return answer(
            Refused(400, f"The body is not a JSON object ({error.errors()[0].get('msg', 'unread')}).")
        )

    @app.exception_handler(Exception)
    async def unexpected(_: Any, error: Exception) -> JSONResponse:
        return answer(Refused(500, f"The server has failed ({type(error).__name__})."))

    return Front(app, engine, metrics, api_key)


def answer(refused: Refused) -> JSONResponse:
    """A refusal as OpenAI's clients read it."""
    kind = _TYPES.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    error = {"message": refused.sentence, "type": kind, "param": None, "code": None}
    headers = {} if refused.retry_after is None else {"Retry-After": str(refused.retry_after)}
    return JSONResponse({"error": error}, refused.status, headers)


class Front:
    """What every request passes first: the key, the size of its body, whether its client is still there, and
    the count of requests."""

    def __init__(self, app: FastAPI, engine: Engine, metrics: Metrics, api_key: str | None) -> None:
        self._app, self._engine, self._metrics = app, engine, metrics
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        exchange = Exchange(endpoint=path if path in (*_KEPT, *_OURS) else "other", engine=self._engine)
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                exchange.finished = True
            await send(message)

        try:
            await self._serve(exchange, scope, receive, counted)
        finally:
            if exchange.gone:
                status = 499
            self._metrics.requests.labels(exchange.endpoint, str(status)).inc()

    async def _serve(self, exchange: Exchange, scope: Message, receive: Receive, send: Send) -> None:
        try:
            headers = Headers(scope=scope)
            if self._key is None:
                _check_host(headers)
            elif scope["path"] != "/health":
                self._check_key(headers)
            body = await _read(receive)
        except Refused as error:
            await answer(error)(scope, receive, send)
            return
        if body is None:
            exchange.gone = True
            return
        current.set(exchange)
        left = asyncio.Event()
        replay = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            if replay:
                return replay.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not exchange.finished:
                exchange.leave()
            left.set()

        watching = asyncio.create_task(watch())
        try:
            await self._app(scope, replayed, send)
        finally:
            watching.cancel()

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        right = self._key is not None and hmac.compare_digest(key.encode(), self._key)
        if scheme.lower() != "bearer" or not right:
            raise Refused(401, "This server wants its API key, as in 'Authorization: Bearer KEY'.")


def _check_host(headers: Headers) -> None:
    """Raises Refused (403) for a request to another machine's name. A page on the web can let its name point
    to this machine, and its visitor's browser would then send its requests here."""
    host = headers.get("host", "localhost")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not is_local(name.lower()):
        raise Refused(403, f"Without an API key this server is asked as localhost, not as {name!r}.")


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None where the client has gone before its end. Raises Refused for a body that is too
    large."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _LARGEST:
            raise Refused(413, f"The body has more than {_LARGEST // 2**20} MiB.")
        if not message.get("more_body"):
            return b"".join(parts)
