"""What `farspan serve` uses of transformers' server, which has no public interface, and whether it is
there."""

from __future__ import annotations

import inspect
import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ....attention.errors import FarspanError, Unsupported
from ..releases import installed, tested_requirement

_HOME = "transformers.cli.serving"
_PACKAGES = (
    "fastapi",
    "openai",
    "prometheus_client",
    "pydantic",
    "starlette",
    "uvicorn",
)  # the extra [serving]

NAMES = (
    "server.build_server",
    "model_manager.ModelManager.load_model_and_processor",
    "model_manager.ModelManager.process_model_name",
    "model_manager.ModelManager.get_model_modality",
    "chat_completion.ChatCompletionHandler.handle_request",
    "completion.CompletionHandler.handle_request",
    "response.ResponseHandler.handle_request",
    "utils.BaseHandler._build_generation_config",
    "utils.BaseHandler._resolve_model",
    "utils.BaseGenerateManager.generate_streaming",
    "utils.BaseGenerateManager.generate_non_streaming",
    "utils.DirectStreamer.put",
    "utils.DirectStreamer.cancel",
    "utils.GenerationState.get_manager",
    "utils.GenerationState.use_continuous_batching",
    "utils._StreamError",
)
"""What is overridden or called, by file."""

ARGUMENTS = {
    "server.build_server": {
        "model_manager",
        "chat_handler",
        "completion_handler",
        "response_handler",
        "generation_state",
        "transcription_handler",
        "systemone_handler",
    },
    "utils.BaseGenerateManager.generate_streaming": {
        "self",
        "model",
        "processor",
        "inputs",
        "gen_config",
        "request_id",
    },
    "utils.DirectStreamer": {"tokenizer", "loop", "queue"},
}
"""The arguments that are given; no other one may be required."""


def check(names: tuple[str, ...] = NAMES) -> None:
    """Raises FarspanError without the packages of the extra, and Unsupported where the installed release of
    transformers lacks one of ``names`` or wants other arguments."""
    if lacking := [name for name in _PACKAGES if find_spec(name) is None]:
        raise FarspanError(
            f"farspan serve needs {', '.join(lacking)}: run pip install 'farspan[serving]', or "
            "pip install '.[serving]' in a checkout."
        )
    faults = [f"{_HOME}.{name} is missing" for name in names if _find(name) is None]
    if not faults:
        faults = [
            f"{_HOME}.{name} wants {', '.join(sorted(other))}"
            for name, given in ARGUMENTS.items()
            if (other := _required(name) - given)
        ]
    if faults:
        raise Unsupported(
            f"farspan serve cannot use the server of transformers {installed()}; install a tested release "
            f"(pip install '{tested_requirement()}')",
            faults,
        )


def quiet() -> None:
    """Let transformers' server log errors alone; it warns of every request."""
    logging.getLogger(_HOME).setLevel(logging.ERROR)


def stream_error(sentence: str) -> Any:
    """What ends a stream with an error. transformers writes the text into JSON without escapes."""
    return import_module(f"{_HOME}.utils")._StreamError(sentence.replace("\\", "/").replace('"', "'"))


def _find(name: str) -> Any:
    module, *parts = name.split(".")
    try:
        found: Any = import_module(f"{_HOME}.{module}")
    except ImportError:
        return None
    for part in parts:
        found = getattr(found, part, None)
    return found


def _required(name: str) -> set[str]:
    parameters = inspect.signature(_find(name)).parameters.values()
    return {x.name for x in parameters if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD}
