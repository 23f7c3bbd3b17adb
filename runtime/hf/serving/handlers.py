"""transformers' handlers of the endpoints, with checked bodies, seeds and the tokens that were reused."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler

from ...models import has_chat
from ...serving.answers import Prompt
from ...serving.engine import Refused, said
from ..generation import streams
from . import body as bodies
from .exchange import current

logger = logging.getLogger("farspan")


class Served(BaseHandler):
    """A handler of transformers in front of the engine."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """The response to a checked body. Raises Refused, or starlette's HTTPException, with one sentence."""
        exchange, models = current.get(), self.model_manager
        bodies.check(exchange.endpoint, body)
        models.check_name(body.get("model"))
        tokenizer = models.answers.tokenizer
        if exchange.endpoint != "/v1/completions" and not has_chat(tokenizer):
            raise Refused(400, "This model has no chat template: use /v1/completions.")
        exchange.settings = bodies.settings(body)
        exchange.steered = bool(exchange.settings) or not body.keys().isdisjoint(("logit_bias", "stop"))
        exchange.seed = body.pop("seed", None)
        if "max_completion_tokens" in body:  # some releases ignore it
            body["max_tokens"] = body.pop("max_completion_tokens")
        body["model"] = models.force_model
        body.setdefault("stream", False)
        try:
            # transformers' server reads the tokens of a prompt in the event loop, where other requests wait.
            await asyncio.to_thread(models.answers.check_texts, list(bodies.texts(body)))
            response = await super().handle_request(body, request_id)
        except (Refused, HTTPException):
            raise
        except Exception as error:
            logger.warning("A request cannot be read (%s: %s).", type(error).__name__, error)
            raise Refused(400, f"The request cannot be read ({said(error)}).") from error
        return _with_cached_tokens(response, exchange.prompt)

    def _build_generation_config(self, body: dict[str, Any], *_: Any, **__: Any) -> Any:
        """That of the model, changed by the ``generation_config`` of the request, then by its other
        fields."""
        given = current.get().settings
        base = copy.deepcopy(self.model_manager.config)
        for name, value in given.items():
            setattr(base, name, value)
        config = super()._build_generation_config(body, base)
        if not any(name in body for name in bodies.LIMITS):
            config.max_new_tokens = given.get("max_new_tokens")  # None: as many as there is room for
        sampled = body.get("temperature", 1) > 0
        if sampled and ("temperature" in body or "top_p" in body):
            config.do_sample = True
        if not streams(config):
            raise Refused(400, "Only greedy decoding and sampling are served: leave num_beams out.")
        return config


class Chat(Served, ChatCompletionHandler):
    """/v1/chat/completions"""


class Completion(Served, CompletionHandler):
    """/v1/completions"""


class Responses(Served, ResponseHandler):
    """/v1/responses"""


def _with_cached_tokens(response: Any, prompt: Prompt | None) -> Any:
    """The response with the number of reused tokens in its ``usage``."""
    if prompt is None:
        return response
    if isinstance(response, JSONResponse):
        value = json.loads(response.body)
        _add(value, prompt.reused)
        return JSONResponse(value, response.status_code)
    response.body_iterator = _events(response.body_iterator, prompt)
    return response


async def _events(chunks: AsyncIterator[str], prompt: Prompt) -> AsyncIterator[str]:
    """The events of a stream. The last one has a ``usage``."""
    try:
        async for chunk in chunks:
            if '"usage"' in chunk:
                lines = [_event(line, prompt.reused) for line in chunk.split("\n")]
                chunk = "\n".join(lines)
            yield chunk
    finally:
        await chunks.aclose()  # type: ignore[attr-defined]


def _event(line: str, reused: int) -> str:
    if not line.startswith("data: {"):
        return line
    value = json.loads(line.removeprefix("data: "))
    _add(value.get("response", value), reused)
    return f"data: {json.dumps(value, ensure_ascii=False)}"


def _add(value: dict[str, Any], reused: int) -> None:
    usage = value.get("usage")
    if usage is not None:
        name = "input_tokens_details" if "input_tokens" in usage else "prompt_tokens_details"
        usage[name] = {**usage.get(name, {}), "cached_tokens": reused}
