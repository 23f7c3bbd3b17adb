"""The body of a request: which values its fields may have, in sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from ....attention.errors import FarspanError
from ...serving.engine import Refused
from ..generation import servable

LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""The fields that bound an answer, by endpoint and age."""

_SERVERS_OWN = {"messages", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "documents"
}
"""What a client may not set of a chat template. `chat_template` is one of them: a template is a program, and
that of a client could keep the server busy for hours."""
_UNREAD = {"audio_url", "file", "image_url", "input_audio", "input_file", "input_image", "video_url"}
"""Parts of a message that transformers' server would leave out unsaid."""


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x < 2**63


def _list_of(kind: type, least: int = 0) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, list) and len(x) >= least and all(isinstance(item, kind) for item in x)


def _messages(x: Any) -> bool:
    return _list_of(dict, 1)(x) and all(isinstance(item.get("role"), str) for item in x)


def _text(x: Any) -> bool:
    return isinstance(x, str)


def _stops(x: Any) -> bool:
    return bool(x) and (_text(x) or (_list_of(str)(x) and all(x)))


def _template_settings(x: Any) -> bool:
    return isinstance(x, dict) and not _SERVERS_OWN & x.keys()


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "messages": (_messages, "a list of at least one message, each an object with a role"),
    "prompt": (_text, "a text"),
    "input": (lambda x: _text(x) or _list_of(dict, 1)(x), "a text or a list of items"),
    "instructions": (_text, "a text"),
    "stream": (lambda x: isinstance(x, bool), "true or false"),
    "temperature": (_number(0, 2), "a number from 0 to 2"),
    "top_p": (lambda x: _number(0, 1)(x) and x > 0, "a number above 0, at most 1"),
    "frequency_penalty": (_number(-0.99, 2), "a number above -1, at most 2"),
    "seed": (_whole(0), "a whole number from 0 on"),
    "stop": (_stops, "a text or a list of texts, none of them empty"),
    "tools": (_list_of(dict), "a list of objects"),
    "logit_bias": (
        lambda x: isinstance(x, dict) and all(k.isdecimal() and _number(-100, 100)(v) for k, v in x.items()),
        "an object of numbers from -100 to 100 by token ids",
    ),
    "suffix": (_text, "a text"),
    "n": (lambda x: x == 1, "1"),
    "chat_template_kwargs": (
        _template_settings,
        "an object of variables of the chat template, without those that the server sets",
    ),
    "generation_config": (_text, "a text with a JSON object"),
    **dict.fromkeys(LIMITS, (_whole(1), "a whole number from 1 on")),
}
_REQUIRED = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/responses": "input"}


def check(endpoint: str, body: dict[str, Any]) -> None:
    """Raises Refused (400) for a field that is missing or has a wrong value. null is left out."""
    for name in [name for name, value in body.items() if value is None]:
        del body[name]
    needed = _REQUIRED[endpoint]
    if needed not in body:
        raise Refused(400, f"The request has no {needed!r}: it is {_FIELDS[needed][1]}.")
    for name, (allowed, what) in _FIELDS.items():
        if name in body and not allowed(body[name]):
            raise Refused(400, f"{name!r} is {what}; got {json.dumps(body[name])[:80]}.")
    for field in ("messages", "input"):
        _check_parts(body.get(field))
    if "logit_bias" in body:
        body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}


def texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def _check_parts(messages: Any) -> None:
    """Raises Refused (400) for images, sounds and files."""
    for message in messages if isinstance(messages, list) else ():
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind in _UNREAD:
                raise Refused(400, f"This server reads text; a message has a part of the type {kind!r}.")


def settings(body: dict[str, Any]) -> dict[str, Any]:
    """The settings of the field ``generation_config``, which is taken out. Raises Refused (400) for one that
    cannot be served."""
    text = body.pop("generation_config", None)
    if text is None:
        return {}
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("no object")
        servable(given)
    except FarspanError as error:
        raise Refused(400, str(error)) from None
    except ValueError:
        raise Refused(400, "'generation_config' is a text with a JSON object.") from None
    return given
