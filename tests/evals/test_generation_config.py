"""Evaluations decode greedily by a config of their own, whatever the model's generation config says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

import farspan
from farspan.evals import batch as forward
from farspan.evals.results import read
from farspan.evals.run import run
from farspan.evals.speed import Speed

_spec = importlib.util.spec_from_file_location("farspan_tests_tiny", Path(__file__).with_name("tiny.py"))
assert _spec is not None and _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

NEW = 8
PROMPTS = [[*range(40, 60)], [*range(70, 83)]]
SETTINGS: dict[str, Any] = {
    "use_cache": False,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(3, 128, 2)),
    "min_new_tokens": 30,
    "max_length": 3,
    "return_dict_in_generate": True,
    "output_attentions": True,
    "prompt_lookup_num_tokens": 3,
    "stop_strings": ["e"],
    "cache_implementation": "static",
    "num_beams": 3,
    "num_return_sequences": 2,
    "do_sample": True,
    "repetition_penalty": 9.0,
    "forced_eos_token_id": 5,
    "guidance_scale": 3.0,
    "prefill_chunk_size": 4,
    "max_time": 0.0,
    "eos_token_id": 60,
    "token_healing": True,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    """The likeliest token, again and again, each from the whole text anew."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(NEW):
            with torch.no_grad():
                token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], 1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


def greedy(model: Any, how: dict[str, Any]) -> list[list[int]]:
    """Answers under generation settings `how`; checks that the model keeps its own config."""
    own = GenerationConfig()
    for name, value in how.items():
        setattr(own, name, value)
    before, model.generation_config = model.generation_config, own
    try:
        batch = forward.collate(PROMPTS, 0, model.device)
        cache = forward.prefill(model, batch)
        answers = forward.greedy(model, batch, cache, max_new_tokens=NEW, pad=0, eos=())
        assert model.generation_config is own
        assert all(getattr(own, name) == value for name, value in how.items())
        return answers
    finally:
        model.generation_config = before


@pytest.mark.parametrize("name", SETTINGS)
def test_f19_no_setting_changes_an_answer(model: Any, expected: list[list[int]], name: str) -> None:
    assert greedy(model, {name: SETTINGS[name]}) == expected
    with farspan.patch(model, "dense"):
        assert greedy(model, {name: SETTINGS[name]}) == expected


def test_f19_not_even_nonsense_in_every_setting_is_read(model: Any, expected: list[list[int]]) -> None:
    assert greedy(model, dict.fromkeys(vars(GenerationConfig()), "nonsense")) == expected


def test_f19_the_prompt_is_read_once(model: Any) -> None:
    """After the prefill of all tokens but the last, every call takes one token."""
    fed: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for settings, config in (({"use_cache": False}, True), ({}, False)):
            fed.clear()
            model.config.use_cache = config
            greedy(model, settings)
            assert fed == [len(PROMPTS[0]) - 1] + [1] * NEW
    finally:
        hook.remove()
        model.config.use_cache = True


def test_f19_a_wrapped_model_generates_by_the_same_config(expected: list[list[int]]) -> None:
    """PEFT hands the wrapper's generation config on to the model inside, and leaves it there."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2)  # adds nothing: B is 0
    model = get_peft_model(tiny.tiny_model(), lora).eval()
    inner, own = model.base_model.model, GenerationConfig(no_repeat_ngram_size=1)
    inner.generation_config = own
    assert greedy(model, {"suppress_tokens": [*range(3, 128, 2)]}) == expected
    assert inner.generation_config is own


def test_f19_config_json_says_what_was_set_aside(model: Any, tmp_path: Path) -> None:
    """Rows are the same with and without settings, and one folder holds both sessions."""
    given: dict[str, Any] = {"config": {"suite": "ruler"}}
    asked, own = tiny.samples(1), model.generation_config

    def evaluate(methods: list[str], folder: str, **settings: Any) -> Any:
        model.generation_config = GenerationConfig(eos_token_id=2, **settings)
        try:
            run(tiny.setup(model, methods, tmp_path / folder, **given), asked)
        finally:
            model.generation_config = own
        return read(tmp_path / folder)

    settings = {"no_repeat_ngram_size": 1, "suppress_tokens": [3, 4], "use_cache": False, "do_sample": False}
    plain, _ = evaluate(["dense"], "a")
    config, rows = evaluate(["window:w=16,sinks=2"], "a", **settings)
    assert "generation_config_set_aside" not in config["sessions"][0]
    told = config["sessions"][1]["generation_config_set_aside"]
    assert told == {"no_repeat_ngram_size": 1, "suppress_tokens": [3, 4], "use_cache": False}
    assert {name: plain[name] for name in plain if name not in ("sessions", "methods", "planned")} == {
        name: config[name] for name in config if name not in ("sessions", "methods", "planned")
    }
    _, again = evaluate(["dense", "window:w=16,sinks=2"], "b")
    apart, together = (
        {(row["key"], row["method"]): (row["answer"], row["nll"]) for row in kind} for kind in (rows, again)
    )
    assert apart == together and len(rows) == 4


def test_f19_speed_says_what_was_set_aside_and_never_stops_early(model: Any, tmp_path: Path) -> None:
    own = model.generation_config
    model.generation_config = GenerationConfig(use_cache=False, eos_token_id=[*range(128)])
    try:
        text = tiny.prose("the grass is green. " * 40)
        suite = Speed(text=text, lengths=[32], new_tokens=5, repeats=1)
        tiny.evaluated(suite, tiny.setup(model, ["dense"], tmp_path, config=suite.config))
        batch = forward.collate(PROMPTS, 0, model.device)
        answers = forward.greedy(model, batch, forward.prefill(model, batch), max_new_tokens=5, pad=0, eos=())
    finally:
        model.generation_config = own
    session = json.loads((tmp_path / "config.json").read_text())["sessions"][0]
    assert session["generation_config_set_aside"] == {"use_cache": False}
    assert [len(answer) for answer in answers] == [5, 5]


@pytest.mark.parametrize("pad", [None, 128, 5000, -1])
def test_a_padding_id_without_an_embedding_is_passed_over(
    model: Any, expected: list[list[int]], pad: int | None
) -> None:
    tokenizer = type("T", (tiny.CharTokenizer,), {"pad_token_id": pad})()
    assert forward.pad_token(model, tokenizer) == 2  # the end token
    batch = forward.collate(PROMPTS, forward.pad_token(model, tokenizer), model.device)
    cache = forward.prefill(model, batch)
    assert forward.greedy(model, batch, cache, max_new_tokens=NEW, pad=2, eos=()) == expected
    tokenizer.pad_token_id = 7
    assert forward.pad_token(model, tokenizer) == 7


def test_a_padding_id_without_an_embedding_in_an_evaluation(model: Any, tmp_path: Path) -> None:
    """A batch of prompts with different lengths gives the rows that each prompt gives alone."""
    tokenizer = type("T", (tiny.CharTokenizer,), {"pad_token_id": 128})()
    given: dict[str, Any] = {"tokenizer": tokenizer, "config": {"suite": "ruler"}}
    found = []
    for size in (1, 3):
        out = tmp_path / str(size)
        run(tiny.setup(model, ["dense"], out, **given), tiny.samples(3), batch_size=size)
        found.append({row["key"]: (row["answer"], round(row["nll"], 4)) for row in read(out)[1]})
    assert found[0] == found[1] and len(found[0]) == 6
