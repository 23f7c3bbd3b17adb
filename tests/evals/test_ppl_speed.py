"""Perplexity against a full forward of the unpatched model; speed's bookkeeping on a clock that is known."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan import FarspanError
from farspan.evals import speed as speed_module
from farspan.evals.perplexity import cut_windows, perplexity
from farspan.evals.results import read
from farspan.evals.sample import encode
from farspan.evals.speed import speed, summarise

_spec = importlib.util.spec_from_file_location("farspan_tests_tiny", Path(__file__).with_name("tiny.py"))
assert _spec is not None and _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

TEXT = " ".join(f"Line {i} says {i * i % 97} and then {i * 7 % 31}." for i in range(60))
WINDOW = "window:w=8,sinks=1"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


def measure(model: Any, out: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {"context": 60, "tokens": 20, "windows": 3, "batch_size": 2, "progress": False}
    given |= {"methods": ["dense", "recycled:k=12,stride=4", WINDOW], "text": TEXT}
    return perplexity(model, tiny.CharTokenizer(), out=out, model_name="tiny", config={}, **(given | changes))


def test_dense_equals_one_full_forward(model: Any, tmp_path: Path) -> None:
    data = measure(model, tmp_path).data
    for row in read(tmp_path)[1][:3]:
        if row["method"] != "dense":
            continue
        ids = list(cut_windows(tiny.CharTokenizer(), TEXT, 80, 3))[row["index"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float()
        nll = torch.nn.functional.cross_entropy(logits[59:79], torch.tensor(ids[60:]))
        assert row["nll"] == pytest.approx(float(nll), abs=1e-4)
    dense, recycled, window = data["methods"]
    assert dense["nll_diff"]["mean"] == 0
    assert recycled["nll_diff"]["n"] == 3 and recycled["nll_diff"]["mean"] != 0
    assert window["prefill_density"] < 1
    text = (tmp_path / "ppl.md").read_text()
    assert "| `dense` | 3 | 1.0000 | – |" in text
    assert f"| `recycled:k=12,stride=4` | 3 | {math.exp(recycled['nll_diff']['mean']):.4f} |" in text


def test_windows_are_disjoint_parts_of_the_text() -> None:
    cut = list(cut_windows(tiny.CharTokenizer(), TEXT, 80, 3))
    assert [len(ids) for ids in cut] == [80] * 3
    third = len(TEXT) // 3
    for number, ids in enumerate(cut):
        start = number * len(TEXT) // 3
        assert abs(start - number * third) <= 2
        assert tiny.CharTokenizer().decode(ids) == TEXT[start : start + 79]  # the 80th is BOS
    with pytest.raises(FarspanError, match="the text is too short"):
        list(cut_windows(tiny.CharTokenizer(), TEXT, 2000, 3))


def test_perplexity_resumes_and_refuses(model: Any, tmp_path: Path) -> None:
    measure(model, tmp_path, methods=["dense"])
    before = (tmp_path / "samples.jsonl").read_text()
    measure(model, tmp_path, methods=["dense", WINDOW])
    after = (tmp_path / "samples.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == 6
    with pytest.raises(FarspanError, match="context"):
        measure(model, tmp_path, context=50)
    for wrong in ({"per_call": 17}, {"context": 0}, {"windows": 0}):
        with pytest.raises(FarspanError):
            measure(model, tmp_path / "x", **wrong)


def test_perplexity_by_larger_calls_is_the_same_for_dense(model: Any, tmp_path: Path) -> None:
    one = measure(model, tmp_path / "1", methods=["dense"]).data["methods"][0]["nll"]
    many = measure(model, tmp_path / "7", methods=["dense"], per_call=7).data["methods"][0]["nll"]
    assert one == pytest.approx(many, abs=1e-4)


def test_speed_measures_everyone_in_turn(model: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"lengths": [64, 32], "new_tokens": 5, "repeats": 2, "progress": False}
    given |= {"model_name": "tiny", "config": {}}
    summary = speed(model, tiny.CharTokenizer(), TEXT, ["dense", WINDOW], tmp_path, **given)
    rows = read(tmp_path)[1]
    assert [(row["length"], row["method"]) for row in rows[:3]] == [
        (32, m) for m in ("unpatched", "dense", WINDOW)
    ]
    assert len(rows) == 2 * 2 * 3
    assert [row["method"] for row in summary.data["overall"][:3]] == ["unpatched", "dense", WINDOW]
    for row in summary.data["overall"]:
        assert row["repeats"] == 2 and row["prefill_seconds"] > 0 and row["decode_tokens_per_second"] > 0
        assert (row["decode_density"] is None) == (row["method"] == "unpatched")
    assert "× unpatched" in (tmp_path / "speed.md").read_text()
    assert model.config._attn_implementation != "farspan"
    with pytest.raises(FarspanError, match="one run"):
        speed(model, tiny.CharTokenizer(), TEXT, ["dense", WINDOW], tmp_path, **given)
    for wrong in ({"lengths": []}, {"lengths": [1]}, {"repeats": 0}):
        with pytest.raises(FarspanError, match="at least"):
            speed(model, tiny.CharTokenizer(), TEXT, ["dense"], tmp_path / "x", **(given | wrong))


def test_speed_of_samples_says_whose_answers_are_right(model: Any, tmp_path: Path) -> None:
    """The oracle is what a plain generate of the unpatched model answers."""
    tokenizer = tiny.CharTokenizer()
    asked = [tiny.sample("vt", index, length=128) for index in range(2)]
    texts = []
    for sample in asked:
        ids = torch.tensor([encode(tokenizer, sample)])
        made = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :].tolist()))
    asked = [
        replace(asked[0], references=(texts[0][-4:],)),
        replace(asked[1], references=("no such answer",)),
    ]
    given: dict[str, Any] = {"lengths": [128], "new_tokens": 8, "repeats": 1, "batch_size": 2}
    given |= {"model_name": "tiny", "config": {}, "progress": False}
    data = speed(model, tokenizer, {128: asked}, ["dense", WINDOW], tmp_path, **given).data
    unpatched, dense, window = (row["score"] for row in data["overall"])
    assert unpatched == dense == 0.5 and window in (0.0, 0.5)
    assert "| found |" in (tmp_path / "speed.md").read_text()


def test_speedups_are_ratios_of_medians() -> None:
    def row(method: str, prefill: float, rate: float) -> dict:
        shares = {"prefill_density": None, "decode_density": None}
        return {
            "method": method,
            "length": 8,
            "prefill_seconds": prefill,
            "decode_tokens_per_second": rate,
        } | shares

    rows = [row("unpatched", p, r) for p, r in ((1.0, 10.0), (2.0, 20.0), (9.0, 1.0))]
    rows += [row("quest", p, r) for p, r in ((4.0, 40.0), (1.0, 30.0), (4.0, 5.0))]
    found = summarise({"lengths": [8], "methods": ["quest"]}, rows)["overall"][1]
    assert found["prefill_speedup"] == 0.5  # 2 / 4
    assert found["decode_speedup"] == 3.0  # 30 / 10
    assert speed_module.UNPATCHED == "unpatched"
