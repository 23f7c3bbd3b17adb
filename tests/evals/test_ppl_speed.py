"""Perplexity against a full forward of the unpatched model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan import FarspanError
from farspan.evals import perplexity as ppl_module
from farspan.evals import report, summary
from farspan.evals.perplexity import Perplexity, cut_windows
from farspan.evals.results import ResultsError, read
from farspan.runtime.table import Table

_spec = importlib.util.spec_from_file_location("farspan_tests_tiny", Path(__file__).with_name("tiny.py"))
assert _spec is not None and _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

TEXT = " ".join(f"Line {i} says {i * i % 97} and then {i * 7 % 31}." for i in range(60))
WINDOW = "window:w=8,sinks=1"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


def printed(table: Table) -> str:
    return table.text(120)


def measure(model: Any, out: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {"lengths": [80], "new_tokens": 20, "samples": 3, "text": tiny.prose(TEXT)}
    methods = changes.pop("methods", ["dense", "recycled:k=12,stride=4", WINDOW])
    kept = {name: changes.pop(name) for name in ("config", "recipe") if name in changes}
    rows = changes.pop("batch_size", 2)
    suite = Perplexity(**(given | changes))
    config = suite.config | kept.pop("config", {})
    setup = tiny.setup(model, methods, out, config=config, **kept)
    suite.check(setup.tokenizer)
    return tiny.evaluated(suite, setup, batch_size=rows)


def forward_nll(model: Any, index: int, length: int = 80, scored: int = 20, samples: int = 3) -> float:
    """Nats per token of a window's last tokens, by one forward call of the unpatched model."""
    ids = list(cut_windows(tiny.CharTokenizer(), TEXT, length, samples))[index]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    return float(
        torch.nn.functional.cross_entropy(logits[-scored - 1 : -1], torch.tensor(ids[length - scored :]))
    )


def test_dense_equals_one_full_forward(model: Any, tmp_path: Path) -> None:
    data = measure(model, tmp_path).data
    exact = [forward_nll(model, index) for index in range(3)]
    found = {row["index"]: row for row in read(tmp_path)[1] if row["method"] == "dense"}
    assert [found[i]["nll"] for i in range(3)] == pytest.approx(exact, abs=1e-4)
    assert {row["gold_tokens"] for row in found.values()} == {20}
    dense, recycled, window = data["methods"]
    assert dense["nll_diff"]["mean"] == 0
    assert recycled["nll_diff"]["n"] == 3 and recycled["nll_diff"]["mean"] != 0
    assert window["prefill_density"] < 1


def test_perplexity_is_printed_beside_the_difference(model: Any, tmp_path: Path) -> None:
    data = measure(model, tmp_path).data
    exact = math.exp(sum(forward_nll(model, index) for index in range(3)) / 3)
    dense, recycled, _ = data["methods"]
    assert dense["perplexity"] == pytest.approx(exact, rel=1e-4)
    assert recycled["perplexity"] == pytest.approx(exact * math.exp(recycled["nll_diff"]["mean"]), rel=1e-4)
    text = (tmp_path / "ppl.md").read_text()
    assert f"| `dense` | 3 | {exact:.2f} | 1.0000 | – |" in text
    ratio = math.exp(recycled["nll_diff"]["mean"])
    assert f"| `recycled:k=12,stride=4` | 3 | {recycled['perplexity']:.2f} | {ratio:.4f} |" in text
    shown = printed(report.terminal_table(data))
    assert "perplexity" in shown and "score" not in shown and f" {exact:.2f} " in shown
    assert json.loads((tmp_path / "summary.json").read_text())["overall"][0]["perplexity"] == pytest.approx(
        exact
    )


def test_a_perplexity_beyond_all_floats_is_no_traceback(model: Any, tmp_path: Path) -> None:
    measure(model, tmp_path, methods=["dense"])
    config, rows = read(tmp_path)
    data = summary.summarise(config, [row | {"nll": 1e4} for row in rows])
    assert data["methods"][0]["perplexity"] == math.inf
    assert " inf " in printed(report.terminal_table(data))


@pytest.mark.parametrize(
    "spec",
    [
        "dense",
        "block_topk:k=16,block=16",
        WINDOW,
        "recycled:k=12,stride=4",
        "quest:k=16,dense_layers=0",
        "snapkv:k=24,window=8",
        "h2o:k=24",
        "strided:stride=8",
        "block_topk:k=16,block=16 + quest:k=16,dense_layers=0",
    ],
)
def test_tokens_fed_16_at_a_time_score_as_one_by_one(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    given: dict[str, Any] = {"methods": [spec], "samples": 2, "new_tokens": 40, "lengths": [110]}
    calls: list[int] = []
    with model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    ):
        measure(model, tmp_path / "16", **given)
        assert calls == [69, 16, 16, 8]
        monkeypatch.setattr(ppl_module, "DECODE_ROWS", 1)
        measure(model, tmp_path / "1", **given)
        assert calls[4:] == [69, *[1] * 40]
    many, single = ({row["key"]: row for row in read(tmp_path / name)[1]} for name in ("16", "1"))
    assert many.keys() == single.keys()
    for key, row in many.items():
        assert row["nll"] == pytest.approx(single[key]["nll"], abs=1e-4)
        assert row["density"] == pytest.approx(single[key]["density"], abs=1e-6)


def test_windows_are_disjoint_parts_of_the_text() -> None:
    tokenizer = tiny.CharTokenizer()
    for count, parts in ((1, [0]), (2, [0, 4]), (3, [0, 4, 2]), (5, [0, 4, 2, 6, 1])):
        cut = list(cut_windows(tokenizer, TEXT, 80, count))
        assert [len(ids) for ids in cut] == [80] * count
        for part, ids in zip(parts, cut, strict=True):
            start = part * len(TEXT) // 8
            assert tokenizer.decode(ids) == TEXT[start : start + 79]  # the 80th is BOS
    assert len(TEXT) // 8 > 80
    with pytest.raises(FarspanError, match="The text is too short: 3 windows of 2000 tokens"):
        list(cut_windows(tokenizer, TEXT, 2000, 3))


def test_perplexity_resumes_and_grows(model: Any, tmp_path: Path) -> None:
    """Methods, lengths and samples are added; what is there stays."""
    path, lines = tmp_path / "samples.jsonl", ""
    for changes, count in (
        ({"methods": ["dense"], "samples": 2}, 2),
        ({"methods": ["dense", WINDOW], "samples": 2}, 4),
        ({"methods": ["dense", WINDOW], "samples": 3}, 6),
        ({"methods": ["dense"], "samples": 3, "lengths": [80, 50]}, 9),
        ({"methods": ["dense"], "samples": 1}, 9),
    ):
        assert measure(model, tmp_path, **changes).complete
        before, lines = lines, path.read_text()
        assert lines.startswith(before) and lines.count("\n") == count
    exact = {80: [forward_nll(model, i) for i in range(3)], 50: [forward_nll(model, i, 50) for i in range(3)]}
    for row in read(tmp_path)[1]:
        if row["method"] == "dense":
            assert row["nll"] == pytest.approx(exact[row["length"]][row["index"]], abs=1e-4)
    for changed in ({"new_tokens": 10}, {"text": tiny.prose(TEXT + ".")}):
        with pytest.raises(ResultsError, match=next(iter(changed))):
            measure(model, tmp_path, **changed)


@pytest.mark.parametrize(
    "wrong, says",
    [
        (
            {"lengths": [21]},
            "The length 21 is too short to score its last 20 tokens: a window takes at least 22",
        ),
        ({"lengths": [80, 1]}, "The length 1 is too short"),
        ({"lengths": []}, "give a length"),
        ({"new_tokens": 0}, "at least 1"),
        ({"samples": 0}, "at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_sizes_that_leave_nothing_are_refused(model: Any, tmp_path: Path, wrong: dict, says: str) -> None:
    with pytest.raises(FarspanError, match=says):
        measure(model, tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()
    assert measure(model, tmp_path, methods=["dense"], lengths=[22], samples=1).complete


def test_perplexity_goes_on_after_a_stop(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = ppl_module.forward.teacher_forced, [0]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(ppl_module.forward, "teacher_forced", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(model, tmp_path, methods=["dense", WINDOW])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["complete"], summary["unfinished"]) == (False, ["dense", WINDOW])
    assert (tmp_path / "ppl.md").read_text().count("run the same command to resume") == 1
    lines = (tmp_path / "samples.jsonl").read_text()
    assert lines.count("\n") == 4  # two windows a batch
    assert measure(model, tmp_path, methods=["dense", WINDOW]).complete
    assert (tmp_path / "samples.jsonl").read_text().startswith(lines)
    assert count[0] == 5  # the batch of the third window under both
