"""The official client against a server: every endpoint, whole and in a stream, gives what ``generate``
gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import LogitsProcessor

from .serving import NAME, POSITIONS, Alone, Kept, Served, save, serving

LONG = [{"role": "user", "content": "The grass is green. " * 8 + "What is green?"}]
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="module")
def served(folder: Path) -> Any:
    with serving(folder, "quest:k=32,page=8,dense_layers=0", prefixes=Kept(1 << 30)) as running:
        yield running.ready()


@pytest.fixture(scope="module")
def alone(folder: Path) -> Alone:
    return Alone(folder, "quest:k=32,page=8,dense_layers=0")


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


def test_completions(served: Served, alone: Alone) -> None:
    text = "To be or not to be, that is the question. " * 4
    got = served.client.completions.create(model=NAME, prompt=text, max_tokens=NEW, temperature=0, suffix="!")
    assert got.choices[0].text == alone.text(text, NEW) + "!"
    stream = served.client.completions.create(
        model=NAME, prompt=text, max_tokens=NEW, temperature=0, stream=True
    )
    chunks = list(stream)
    assert "".join(x.choices[0].text for x in chunks) == alone.text(text, NEW)
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 100


def test_responses(served: Served, alone: Alone) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it? " * 10}]
    asked = {"model": NAME, "input": chat[1]["content"], "instructions": "Be brief.", "temperature": 0}
    got = served.client.responses.create(**asked, max_output_tokens=NEW)
    assert got.output_text == alone.text(chat, NEW)
    events = list(served.client.responses.create(**asked, max_output_tokens=NEW, stream=True))
    assert "".join(x.delta for x in events if x.type == "response.output_text.delta") == alone.text(chat, NEW)
    assert events[-1].type == "response.completed"
    usage = events[-1].response.usage
    assert usage.input_tokens == len(alone.ids(chat)) and usage.input_tokens_details.cached_tokens > 0


def test_sampling_follows_the_seed(served: Served, alone: Alone) -> None:
    asked = {"model": NAME, "prompt": "Once upon a time", "max_tokens": NEW, "temperature": 1.5}
    first, again, other = (
        served.client.completions.create(**asked, seed=seed).choices[0].text for seed in (7, 7, 8)
    )
    assert first == again == alone.text("Once upon a time", NEW, seed=7, do_sample=True, temperature=1.5)
    assert first != other
    # a request without a seed does not go on from the one before it
    assert len({served.client.completions.create(**asked).choices[0].text for _ in range(3)}) == 3


def test_stop_and_settings(served: Served, alone: Alone) -> None:
    whole = alone.text(LONG, NEW)
    asked = {"model": NAME, "messages": LONG, "max_tokens": NEW, "temperature": 0}
    got = served.client.chat.completions.create(**asked, stop=[whole[4:6]])
    assert got.choices[0].message.content == whole[:6] and got.choices[0].finish_reason == "stop"
    own = {"generation_config": json.dumps({"repetition_penalty": 5.0, "max_new_tokens": 3})}
    got = served.client.chat.completions.create(model=NAME, messages=LONG, temperature=0, extra_body=own)
    assert got.choices[0].message.content == alone.text(LONG, 3, repetition_penalty=5.0)
    got = served.client.chat.completions.create(**{**asked, "max_tokens": 2}, logit_bias={"65": 100})
    assert got.choices[0].message.content == "AA"


class Says(LogitsProcessor):
    """Lets a model write one text, and then its end."""

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.tokens, self.begin = [*tokenizer(text).input_ids, 2], None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.begin = ids.shape[1] if self.begin is None else self.begin
        only = torch.full_like(scores, -torch.inf)
        only[:, self.tokens[ids.shape[1] - self.begin]] = 0
        return only


CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call>'
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture
def says(served: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    def force(text: str) -> None:
        generate = type(served.model).generate

        def forced(**inputs: Any) -> Any:
            inputs["generation_config"].suppress_tokens = None
            return generate(served.model, **inputs, logits_processor=[Says(text, served.tokenizer)])

        monkeypatch.setattr(served.model, "generate", forced)

    return force


def test_tool_calls(served: Served, says: Any) -> None:
    says(CALL)
    tools = [{"type": "function", "function": TOOL}]
    asked = {"model": NAME, "messages": [{"role": "user", "content": "Rain?"}], "tools": tools}
    choice = served.client.chat.completions.create(**asked, max_tokens=100).choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bonn"})
    chunks = list(served.client.chat.completions.create(**asked, max_tokens=100, stream=True))
    [call] = [y for x in chunks for y in x.choices[0].delta.tool_calls or []]
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Bonn"})
    got = served.client.responses.create(
        model=NAME, input="Rain?", tools=[{"type": "function", **TOOL}], max_output_tokens=100
    )
    [call] = [x for x in got.output if x.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Bonn"})
    # the result goes back to the model
    says("Yes.")
    told = [
        *asked["messages"],
        choice.message.to_dict(),
        {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
    ]
    got = served.client.chat.completions.create(**{**asked, "messages": told}, max_tokens=20)
    assert (got.choices[0].message.content, got.choices[0].finish_reason) == ("Yes.", "stop")


def test_an_answer_without_a_limit_takes_the_room_there_is(served: Served) -> None:
    text = "a" * (POSITIONS - 9)
    got = served.client.completions.create(model=NAME, prompt=text, temperature=0)
    assert got.usage is not None and got.usage.completion_tokens == 9


def test_models_and_health(served: Served) -> None:
    assert [x.id for x in served.client.models.list()] == [NAME]
    assert httpx.get(f"{served.root}/health").json() == {"status": "ok"}


def test_metrics(served: Served) -> None:
    def values() -> dict[str, float]:
        text = httpx.get(f"{served.root}/metrics").text
        return {
            name + "".join(f" {x}" for x in labels.values()): value
            for family in text_string_to_metric_families(text)
            for name, labels, value, *_ in family.samples
        }

    asked = {
        "model": NAME,
        "prompt": "In the beginning was the word. " * 5,
        "max_tokens": 4,
        "temperature": 0,
    }
    served.client.completions.create(**asked)
    before = values()
    usage = served.client.completions.create(**asked).usage
    gained = {name: value - before.get(name, 0) for name, value in values().items()}
    assert usage is not None and usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens
    read = usage.prompt_tokens - cached
    heads, layers = 4, 2
    causal = sum(range(cached + 1, usage.prompt_tokens + 1)) * heads * layers
    assert gained["farspan_requests_total /v1/completions 200"] == 1
    assert gained["farspan_time_to_first_token_seconds_count /v1/completions"] == 1
    assert gained["farspan_tokens_per_second_count /v1/completions"] == 1
    assert gained["farspan_prompt_tokens_total"] == usage.prompt_tokens and read == 17
    assert gained["farspan_new_tokens_total"] == 4
    assert gained["farspan_prefix_hits_total"] == 1 and gained["farspan_prefix_misses_total"] == 0
    assert gained["farspan_reused_tokens_total"] == cached
    assert gained["farspan_attention_pairs_causal_total prefill"] == causal
    assert gained["farspan_attention_pairs_read_total prefill"] == causal  # quest selects at decode
    decode = gained["farspan_attention_pairs_read_total decode"]
    assert 0 < decode < gained["farspan_attention_pairs_causal_total decode"]
    assert values()["farspan_queue_length"] == 0 and values()["process_resident_memory_bytes"] > 0
