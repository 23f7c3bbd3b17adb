"""The queue of a server, and clients that leave it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from farspan.runtime.hf.caches import PatchedCaches
from farspan.runtime.prefixes import PrefixStore

from .serving import NAME, POSITIONS, Alone, Served, save, serving, until

SLOW = {"model": NAME, "prompt": "a" * 24, "max_tokens": POSITIONS - 24, "temperature": 0}
SHORT = {"model": NAME, "prompt": "b" * 24, "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="module")
def served(folder: Path) -> Any:
    with serving(folder, queue=2) as running:
        yield running.ready()


def status(served: Served, code: int) -> float:
    """How many completions have ended with a status so far."""
    return float(served.server.metrics.requests.labels("/v1/completions", str(code))._value.get())


def behind(call: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The caches that the server has made and that are still alive."""
    made: weakref.WeakSet[Any] = weakref.WeakSet()

    empty = PatchedCaches.empty

    def watched(of: PatchedCaches) -> Any:
        made.add(cache := empty(of))
        return cache

    monkeypatch.setattr(PatchedCaches, "empty", watched)
    return made


def test_a_full_queue_and_a_client_that_leaves_in_mid_stream(
    served: Served, folder: Path, caches: Any
) -> None:
    engine = served.server.engine
    stream = served.client.completions.create(**SLOW, stream=True)
    next(iter(stream))
    assert len(caches) == 1
    answers: list[str] = []
    waiting = [
        behind(lambda: answers.append(served.client.completions.create(**SHORT).choices[0].text))
        for _ in range(2)
    ]
    until(lambda: engine.waiting == 2)
    with pytest.raises(openai.RateLimitError, match="queue is full: 2 requests") as full:
        served.client.completions.create(**SHORT)
    assert int(full.value.response.headers["Retry-After"]) >= 1
    assert httpx.get(f"{served.root}/health").status_code == 200  # nothing else waits
    left = status(served, 499)
    stream.close()
    for thread in waiting:
        thread.join(30)
    until(lambda: engine.running is None)
    assert answers == [Alone(folder).text(SHORT["prompt"], 3)] * 2
    until(lambda: status(served, 499) == left + 1)
    gc.collect()
    assert not caches


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue(served: Served, stream: bool) -> None:
    engine, left = served.server.engine, status(served, 499)
    running = served.client.completions.create(**SLOW, stream=True)
    next(iter(running))
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as client:
        if stream:
            with client.stream(
                "POST", f"{served.server.url}/completions", json={**SHORT, "stream": True}
            ) as got:
                for _ in got.iter_lines():
                    pass
        else:
            client.post(f"{served.server.url}/completions", json=SHORT)
    until(lambda: engine.waiting == 0)
    assert engine.running is not None
    running.close()
    until(lambda: status(served, 499) == left + 2 and engine.running is None)


def test_a_client_that_leaves_without_a_stream(served: Served) -> None:
    def read() -> float:
        text = served.server.metrics.text().decode()
        return sum(
            float(x.split()[1])
            for x in text.splitlines()
            if x.startswith("farspan_attention_pairs_causal_total")
        )

    before = read()
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=0.3).completions.create(**SLOW)
    until(lambda: served.server.engine.running is None)
    heads, layers = 4, 2
    whole = sum(range(1, POSITIONS)) * heads * layers
    assert 0 < read() - before < whole / 2


def test_a_prompt_that_is_cancelled_while_it_is_read(folder: Path) -> None:
    """It ends before its first token, and what was there before is still reused."""
    with serving(folder, prefixes=PrefixStore(1 << 30)) as served:
        text = "The river rose. " * 20
        served.ready().client.completions.create(model=NAME, prompt=text, max_tokens=2)
        engine, layers = served.server.engine, served.model.model.layers
        begun, go_on = threading.Event(), threading.Event()

        def hold(*_: Any) -> None:
            begun.set()
            go_on.wait(30)

        hook = layers[0].register_forward_hook(hold)
        gone = httpx.Client(timeout=0.2)
        asked = {
            "model": NAME,
            "prompt": text + "The mayor said nothing. " * 4,
            "max_tokens": 4,
            "temperature": 0,
        }
        with pytest.raises(httpx.ReadTimeout):
            gone.post(f"{served.server.url}/completions", json=asked)
        gone.close()
        assert begun.is_set()
        job = engine.running
        until(lambda: job is not None and job.cancelled)
        hook.remove()
        go_on.set()
        until(lambda: engine.running is None)
        got = served.client.completions.create(**asked)
        assert got.choices[0].text == Alone(folder).text(asked["prompt"], 4)
        assert got.usage is not None and got.usage.prompt_tokens_details is not None
        assert got.usage.prompt_tokens_details.cached_tokens == len(text) - 17


def test_a_server_that_stops_ends_what_waits(folder: Path) -> None:
    with serving(folder) as served:
        stream = served.ready().client.completions.create(**SLOW, stream=True)
        next(iter(stream))
        failed: list[Exception] = []

        def wait() -> None:
            try:
                served.client.completions.create(**SHORT)
            except openai.OpenAIError as error:
                failed.append(error)

        thread = behind(wait)
        until(lambda: served.server.engine.waiting == 1)
        served.server.engine.stop()
        thread.join(30)
        assert failed and served.server.engine.running is None
