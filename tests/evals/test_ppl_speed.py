"""Perplexity against a full forward of the unpatched model; speed's bookkeeping on a clock that is known."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan import FarspanError
from farspan.evals import perplexity as ppl_module
from farspan.evals import report, summary
from farspan.evals import speed as speed_module
from farspan.evals.perplexity import cut_windows, perplexity
from farspan.evals.results import ResultsError, read
from farspan.evals.sample import encode
from farspan.evals.speed import speed, summarise
from farspan.evals.speed_tables import terminal_table
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


# --- perplexity ----------------------------------------------------------------------------------


def measure(model: Any, out: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {"lengths": [80], "new_tokens": 20, "samples": 3, "batch_size": 2, "text": TEXT}
    methods = changes.pop("methods", ["dense", "recycled:k=12,stride=4", WINDOW])
    kept = {name: changes.pop(name) for name in ("config", "recipe") if name in changes}
    return perplexity(tiny.setup(model, methods, out, **kept), **(given | changes))


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
    for changed in ({"new_tokens": 10}, {"text": TEXT + "."}):
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


# --- speed ---------------------------------------------------------------------------------------

GIVEN: dict[str, Any] = {"lengths": [64, 32], "new_tokens": 5, "repeats": 2}


def test_speed_measures_everyone_in_turn(model: Any, tmp_path: Path) -> None:
    summary = speed(tiny.setup(model, ["dense", WINDOW], tmp_path), TEXT, **GIVEN)
    rows = read(tmp_path)[1]
    assert [(row["length"], row["method"]) for row in rows[:3]] == [
        (32, m) for m in ("unpatched", "dense", WINDOW)
    ]
    assert len(rows) == 2 * 2 * 3
    assert [row["method"] for row in summary.data["overall"][:3]] == ["unpatched", "dense", WINDOW]
    for row in summary.data["overall"]:
        assert row["repeats"] == 2 and row["prefill_seconds"] > 0 and row["decode_tokens_per_second"] > 0
        assert (row["decode_density"] is None) == (row["method"] == "unpatched")
        low, high = row["decode_tokens_per_second_range"]
        assert low <= row["decode_tokens_per_second"] <= high
    written = (tmp_path / "speed.md").read_text()
    assert summary.complete and "× unpatched" in written and "lowest to highest" in written
    held = {(row["method"], row["length"]): row["kv_bytes_stored"] for row in summary.data["overall"]}
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert held["unpatched", 64] == (64 + 4) * token, "the last token is not fed again"
    assert held["dense", 64] >= held["unpatched", 64], "buffers have spare room"
    steps = {
        (row["method"], row["length"]): row["kv_bytes_read_per_token"] for row in summary.data["overall"]
    }
    assert steps["unpatched", 64] is None
    assert steps["dense", 64] == token * sum(range(64, 69)) / 5 and steps[WINDOW, 64] < steps["dense", 64] / 2
    assert model.config._attn_implementation != "farspan"
    for wrong in ({"lengths": []}, {"lengths": [1]}, {"repeats": 0}):
        with pytest.raises(FarspanError, match="at least"):
            speed(tiny.setup(model, ["dense"], tmp_path / "x"), TEXT, **(GIVEN | wrong))


class Clock:
    """In place of `Timer.once`: prefill takes `scale` times 1, 2 or 4 seconds by method, decode goes at 100,
    50 or 25 tokens a second divided by it. Stops at call number `stop`."""

    def __init__(self) -> None:
        self.seconds = {"unpatched": 4.0, "dense": 2.0, WINDOW: 1.0}
        self.calls: list[tuple[str, int]] = []
        self.scale, self.stop = 1.0, 0

    def once(self, timer: Any, spec: str, prompts: Any, count: int) -> dict[str, Any]:
        if count == 2:  # warming up
            self.calls.append((spec, 0))
            return {}
        if self.stop == sum(length > 0 for _, length in self.calls) + 1:
            raise KeyboardInterrupt
        self.calls.append((spec, len(prompts.ids[0])))
        seconds = self.scale * self.seconds[spec]
        names = ("score", "prefill_density", "decode_density", "implementation", "peak_memory_bytes")
        return dict.fromkeys((*names, "prefill_sent_bytes", "decode_sent_bytes_per_token")) | {
            "prefill_seconds": seconds,
            "decode_tokens_per_second": 100 / seconds,
        }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(speed_module.Timer, "once", lambda *args: made.once(*args))
    return made


def time_them(model: Any, out: Path, *methods: str, **changes: Any) -> Any:
    return speed(tiny.setup(model, list(methods), out), TEXT, **(GIVEN | changes))


def test_a_finished_speed_run_shows_its_table_again(model: Any, tmp_path: Path, clock: Clock) -> None:
    first = time_them(model, tmp_path, "dense", WINDOW)
    assert first.complete and len(clock.calls) == 3 + 12
    files = {name: (tmp_path / name).read_text() for name in ("samples.jsonl", "summary.json", "speed.md")}
    again = time_them(model, tmp_path, WINDOW)
    assert len(clock.calls) == 15, "nothing is warmed up or measured"
    assert again.data == first.data
    assert printed(terminal_table(again.data)) == printed(terminal_table(first.data))
    assert files == {name: (tmp_path / name).read_text() for name in files}


def test_a_stopped_speed_run_goes_on(model: Any, tmp_path: Path, clock: Clock) -> None:
    clock.stop = 6  # the first repeat at 32, the baseline and dense at 64
    with pytest.raises(KeyboardInterrupt):
        time_them(model, tmp_path, "dense", WINDOW)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["complete"], summary["unfinished"]) == (False, ["dense", WINDOW, "unpatched"])
    assert {(row["method"], row["length"]) for row in summary["overall"]} == {
        (m, n) for m in ("unpatched", "dense", WINDOW) for n in (32, 64)
    } - {(WINDOW, 64)}
    assert "run the same command to resume" in (tmp_path / "speed.md").read_text()
    lines = (tmp_path / "samples.jsonl").read_text()
    assert lines.count("\n") == 5
    clock.stop, clock.scale = 0, 10.0  # the machine is busy now
    clock.calls.clear()
    data = time_them(model, tmp_path, "dense", WINDOW).data
    # What is missing, and the baseline once more beside the first of it.
    assert clock.calls[3:5] == [("unpatched", 64), (WINDOW, 64)]
    assert Counter(clock.calls[5:]) == Counter(
        (m, n) for m in ("unpatched", "dense", WINDOW) for n in (32, 64)
    )
    assert (tmp_path / "samples.jsonl").read_text().startswith(lines)
    assert data["complete"] and data["sessions"] == 2
    for row in data["overall"]:
        assert row["repeats"] == 2 + ((row["method"], row["length"]) == ("unpatched", 64))
        factor = {"unpatched": 1, "dense": 2, WINDOW: 4}[row["method"]]  # in either session
        assert row["prefill_speedup"] == row["decode_speedup"] == factor
    assert "measured in 2 sessions" in printed(terminal_table(data)).replace("\n", " ")


def test_an_added_method_is_compared_within_its_own_session(model: Any, tmp_path: Path, clock: Clock) -> None:
    assert [r["prefill_speedup"] for r in time_them(model, tmp_path, "dense").data["overall"]] == [1, 2, 1, 2]
    clock.scale = 10.0
    clock.calls.clear()
    data = time_them(model, tmp_path, WINDOW, lengths=[32], repeats=3).data
    assert clock.calls[:2] == [("unpatched", 0), (WINDOW, 0)], "dense is done and needs no warming up"
    assert clock.calls[2:] == [("unpatched", 32), (WINDOW, 32)] * 3
    assert data["complete"]
    speedups = {(row["method"], row["length"]): row["prefill_speedup"] for row in data["overall"]}
    assert speedups == {
        ("unpatched", 32): 1,
        ("dense", 32): 2,
        (WINDOW, 32): 4,
        ("unpatched", 64): 1,
        ("dense", 64): 2,
    }


def test_a_run_stopped_before_its_first_row_leaves_room_for_other_methods(
    model: Any, tmp_path: Path, clock: Clock
) -> None:
    clock.stop = 1
    with pytest.raises(KeyboardInterrupt):
        time_them(model, tmp_path, "dense")
    assert json.loads((tmp_path / "summary.json").read_text())["overall"] == []
    clock.stop = 0
    found = time_them(model, tmp_path, WINDOW)
    assert [(row["method"], row["length"]) for row in found.data["overall"]] == [
        ("unpatched", 32), (WINDOW, 32), ("unpatched", 64), (WINDOW, 64),
    ]  # fmt: skip
    assert not found.complete and found.data["unfinished"] == ["dense"]
    assert "(unfinished: dense)" in printed(terminal_table(found.data)).replace("\n", " ")


def test_speed_refuses_another_text_and_damaged_rows(model: Any, tmp_path: Path, clock: Clock) -> None:
    time_them(model, tmp_path, "dense", WINDOW)
    with pytest.raises(ResultsError, match="drawn from another recipe"):
        speed(tiny.setup(model, ["dense"], tmp_path), "x" + TEXT, **GIVEN)
    with pytest.raises(ResultsError, match="new_tokens 5 there, 6 here"):
        time_them(model, tmp_path, "dense", new_tokens=6)
    path = tmp_path / "samples.jsonl"
    path.write_text(path.read_text().replace('"prefill_seconds": 2.0', '"prefill_seconds": null', 1))
    with pytest.raises(ResultsError, match=r"line 2 of .* is damaged \(prefill_seconds is null\)"):
        time_them(model, tmp_path, "dense")


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
    data = speed(tiny.setup(model, ["dense", WINDOW], tmp_path), {128: asked}, **given).data
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
