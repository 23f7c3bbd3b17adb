"""`eval speed`: its measurements on a tiny model, and its bookkeeping on a clock that is known."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan import FarspanError
from farspan.evals import speed as speed_module
from farspan.evals.results import ResultsError, read
from farspan.evals.sample import encode
from farspan.evals.speed import Prompts, Speed
from farspan.evals.speed_summary import summarise
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


GIVEN: dict[str, Any] = {"text": tiny.prose(TEXT), "lengths": [64, 32], "new_tokens": 5, "repeats": 2}


def measured(model: Any, out: Path, *methods: str, **changes: Any) -> Any:
    suite = Speed(**(GIVEN | changes))
    return tiny.evaluated(suite, tiny.setup(model, list(methods), out, config=suite.config))


def test_speed_measures_everyone_in_turn(model: Any, tmp_path: Path) -> None:
    summary = measured(model, tmp_path, "dense", WINDOW)
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
            measured(model, tmp_path / "x", "dense", **wrong)


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
    return measured(model, out, *methods, **changes)


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
        measured(model, tmp_path, "dense", text=tiny.prose("x" + TEXT))
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
    suite = Speed(text=tiny.prose(TEXT), **given)
    prompts = Prompts(length=128, ids=[encode(tokenizer, sample) for sample in asked], asked=asked)
    data = suite.run(tiny.setup(model, ["dense", WINDOW], tmp_path, config=suite.config), [prompts]).data
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
