"""The official client against a server: every endpoint, whole and in a stream, gives what ``generate`` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from .serving import NAME, Alone, Kept, Served, save, serving

LONG = [{"role": "user", "content": "The grass is green. " * 8 + "What is green?"}]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="module")
def served(folder: Path) -> Any:
    with serving(folder, "quest:k=32,page=8", prefixes=Kept()) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    return Alone(folder, "quest:k=32,page=8")


def test_chat(served: Served, alone: Alone) -> None:
    got = served.client.chat.completions.create(model=NAME, messages=LONG, max_tokens=NEW, temperature=0)
    assert got.choices[0].message.content == alone.text(LONG, NEW)
    assert got.choices[0].finish_reason == "length" and got.model == NAME
    assert got.usage is not None and got.usage.completion_tokens == NEW
    assert got.usage.prompt_tokens == len(alone.ids(LONG))


def test_chat_in_a_stream(served: Served, alone: Alone) -> None:
    chunks = list(
        served.client.chat.completions.create(
            model=NAME, messages=LONG, max_tokens=NEW, temperature=0, stream=True
        )
    )
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == alone.text(LONG, NEW)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == NEW
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the test before has read it
