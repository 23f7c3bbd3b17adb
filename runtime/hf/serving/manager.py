"""The parts of transformers' server that load and run models: ours run the one model of the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseGenerateManager, DirectStreamer, GenerationState

from ....attention.errors import FarspanError
from ...serving.answers import Answers, Prompt
from ...serving.engine import Cancelled, Engine, Job, Refused, said
from ...serving.metrics import Metrics
from ..generation import kept_config, streams
from .exchange import Exchange, current
from .internals import stream_error


class OneModel(ModelManager):
    """Serves one model, which the engine's thread loads and patches, under the name that it was given."""

    def __init__(self, name: str, engine: Engine) -> None:
        super().__init__()
        self.force_model = name
        self._engine = engine
        self._began = int(time.time())
        self._answers: Answers | None = None
        self._config: Any = None

    def put(self, answers: Answers) -> None:
        """The model has been loaded."""
        own = answers.model.generation_config
        sampled = {x: getattr(own, x) for x in ("do_sample", "temperature", "top_p")}
        self._config, _ = kept_config(answers.model, **sampled)
        if not streams(self._config):  # beams and assisted decoding write no token at a time
            self._config.num_beams = 1
            self._config.prompt_lookup_num_tokens = None
        self._answers = answers

    @property
    def answers(self) -> Answers:
        """Raises Refused (503) while there is no model."""
        self._engine.check()
        assert self._answers is not None
        return self._answers

    @property
    def config(self) -> Any:
        """The generation config of the model, as far as a patched model can serve it. While the model runs,
        its own is replaced by that of a request."""
        return self._config

    def check_name(self, name: Any) -> None:
        """Raises Refused (404) for the name of another model."""
        if name is not None and name != self.force_model:
            raise Refused(404, f"There is no model {name!r} here; this server has {self.force_model!r}.")

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.answers.model, self.answers.tokenizer

    def list_models(self, *_: Any) -> list[dict[str, Any]]:
        state = "loaded" if self._engine.ready else "loading"
        entry = {"id": self.force_model, "object": "model", "created": self._began, "owned_by": "farspan"}
        return [{**entry, "status": {"value": state}}]

    get_gen_models = list_models  # its name up to transformers 5.21

    def shutdown(self) -> None:
        """Nothing: the command that has started the engine stops it."""


class OneState(GenerationState):
    """Gives every handler the same manager."""

    def __init__(self, manager: EngineManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> EngineManager:
        return self._manager


class EngineManager(BaseGenerateManager):
    """Sends prompts to the engine and brings tokens back to the event loop."""

    def __init__(self, engine: Engine, models: OneModel, metrics: Metrics) -> None:
        self._engine, self._models, self._metrics = engine, models, metrics

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **parsing: Any
    ) -> tuple[asyncio.Queue[Any], DirectStreamer]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        watch = Watch(self._prompt(inputs, gen_config), self._metrics)
        streamer = WatchedStreamer(watch, processor.backend_tokenizer, loop, queue, **parsing)

        def done(_: Any, error: Exception | None) -> None:
            if error is not None:  # without one, the streamer has ended the queue
                said = None if isinstance(error, Cancelled) else stream_error(str(error))
                _in_loop(loop, queue.put_nowait, said)

        watch.submit(self._engine, self._models.answers, streamer, done)
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Tensor]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[int]] = loop.create_future()
        watch = Watch(self._prompt(inputs, gen_config), self._metrics)

        def settle(result: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(
                    Refused(499, "The client has gone.") if isinstance(error, Cancelled) else error
                )

        watch.submit(self._engine, self._models.answers, watch, lambda *ended: _in_loop(loop, settle, *ended))
        try:
            tokens = await future
        except asyncio.CancelledError:
            watch.cancel()
            raise
        text = processor.decode(tokens, skip_special_tokens=True)
        return text, inputs["input_ids"].shape[-1], torch.tensor(tokens, dtype=torch.int64)

    def _prompt(self, inputs: Any, config: Any) -> Prompt:
        exchange = current.get()
        prompt = Prompt(
            ids=inputs["input_ids"].long(),
            config=config,
            endpoint=exchange.endpoint,
            began=exchange.began,
            seed=exchange.seed,
        )
        self._models.answers.check(prompt)
        exchange.prompt = prompt
        return prompt

    def stop(self) -> None:
        """Nothing: the command that has started the engine stops it."""


class Watch:
    """Follows one prompt through the engine: ends it when the client has gone, and measures it. It is a
    streamer of transformers that keeps nothing."""

    def __init__(self, prompt: Prompt, metrics: Metrics) -> None:
        self._prompt, self._metrics = prompt, metrics
        self._exchange: Exchange = current.get()
        self._begun = False
        self._engine: Engine | None = None
        self._job: Job | None = None

    def submit(
        self, engine: Engine, answers: Answers, streamer: Any, done: Callable[[Any, Exception | None], None]
    ) -> None:
        """Let the engine answer the prompt. Raises Refused where it cannot."""

        def run(job: Job) -> list[int]:
            try:
                tokens = answers.answer(self._prompt, job, streamer)
            except (ValueError, IndexError, TypeError, AttributeError) as error:
                if isinstance(error, FarspanError) or not self._exchange.steered:
                    raise
                raise Refused(400, f"The model cannot generate by these settings ({said(error)}).") from error
            self._measure(len(tokens))
            return tokens

        self._engine, self._job = engine, Job(run, done)
        self._exchange.job = self._job
        engine.submit(self._job)
        if self._exchange.gone:
            self.cancel()

    def put(self, value: Any) -> None:
        """One more token; the first call brings the prompt."""
        if self._begun and self._prompt.first is None:
            self._prompt.first = time.monotonic()
        self._begun = True

    def end(self) -> None:
        """The answer is complete."""

    def cancel(self) -> None:
        """The client has gone."""
        if self._engine is not None and self._job is not None:
            self._engine.cancel(self._job)

    def _measure(self, count: int) -> None:
        first, endpoint = self._prompt.first, self._prompt.endpoint
        self._metrics.new_tokens.inc(count)
        if first is not None:
            self._metrics.first_token.labels(endpoint).observe(first - self._prompt.began)
            seconds = time.monotonic() - first
            if count > 1 and seconds > 0:
                self._metrics.speed.labels(endpoint).observe((count - 1) / seconds)


class WatchedStreamer(DirectStreamer):
    """transformers' streamer, with a Watch before it."""

    def __init__(self, watch: Watch, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = watch

    def put(self, value: Any) -> None:
        self._watch.put(value)
        super().put(value)

    def cancel(self) -> None:
        self._watch.cancel()  # ends the job at its next token; ranks have to end at the same one


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *args: Any) -> None:
    """Call a function in an event loop, which may have been closed meanwhile."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *args)
