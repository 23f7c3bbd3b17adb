"""Sweeps of every suite: the rows of the suite alone, also after a stop; and speed is measured alone."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals import run as run_module
from farspan.evals import speed as speed_module
from farspan.evals.results import read
from farspan.evals.suites import SUITES, suite_of
from farspan.evals.sweep.config import read as read_sweep
from farspan.evals.sweep.stops import Stops
from farspan.evals.sweep.work import sweep
from farspan.evals.task import settings

from . import tiny

WINDOW = "window:w=16,sinks=2"
TEXT = "".join(f"Line {n} says {n * n % 97} and then {n * 7 % 31}. " for n in range(90))
OPTIONS = {
    "turns": "lengths: [900]\n    tasks: [kv]\n    turns: 2\n    samples: 2",
    "fidelity": "prompts: [prompts.jsonl]\n    new_tokens: 4",
    "ppl": "lengths: [96, 64]\n    new_tokens: 20\n    samples: 2\n    text: text.txt",
    "speed": "lengths: [64, 32]\n    new_tokens: 3\n    repeats: 2\n    text: text.txt",
}
GRID = """
  - suite: {suite}
    models: [tiny]
    methods: [dense, "window:w=16,sinks=2"]
    batch_size: 1
    {options}
"""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.tiny_model()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARSPAN_CACHE", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)
    Path("prompts.jsonl").write_text("".join(f'"{"the grass is green. " * n}"\n' for n in (3, 6, 2)))
    return tmp_path


def plan(folder: Path, *suites: str, out: str = "swept", head: str = "") -> Any:
    path = folder / "sweep.yaml"
    path.write_text(f"{head}grids:" + "".join(GRID.format(suite=s, options=OPTIONS[s]) for s in suites))
    return read_sweep(path, folder / out)


def swept(plan: Any, model: Any) -> tuple[list[Any], list[str]]:
    said: list[str] = []
    return sweep(plan, lambda grid: (model, tiny.CharTokenizer()), said.append), said


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows without what a clock says, and without coordinates that the suites here do not have."""
    clock = ("seconds", "session", "prefill_seconds", "decode_tokens_per_second", "peak_memory_bytes")
    apart = (*clock, "extra")
    rows = [{n: v for n, v in row.items() if n not in apart} for row in read(out)[1]]
    return sorted(rows, key=lambda row: (row["key"], row["method"]))


@pytest.mark.parametrize("suite", OPTIONS)
def test_the_rows_are_those_of_the_suite_alone_also_after_a_stop(
    suite: str, files: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    [grid] = plan(files, suite).grids
    chosen, config = settings(grid.task, tiny.CharTokenizer())
    setup = tiny.setup(model, grid.methods, files / "alone", config=config, tokenizer=chosen)
    whole = grid.task.run(setup, grid.task.draw(chosen), batch_size=1)
    module = speed_module if suite == "speed" else run_module
    record, left = module.record, [3]

    def stopping(*given: Any) -> None:
        record(*given)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "record", stopping)
    with pytest.raises(KeyboardInterrupt):
        swept(plan(files, suite), model)
    [summary], said = swept(plan(files, suite), model)
    assert summary.complete and said[-1].endswith(f"{len(grid.task.cells(chosen))} cells.")
    rows = rows_of(files / "swept" / f"{suite}-tiny")
    assert [row for row in rows if "/again/" not in row["key"]] == rows_of(files / "alone")
    assert summary.data.keys() - {"stopped"} == whole.data.keys() - {"stopped"}
    assert read(summary.out)[0]["planned"] == read(files / "alone")[0]["planned"]
    before = (summary.out / "samples.jsonl").read_bytes()
    swept(plan(files, suite), model)
    assert (summary.out / "samples.jsonl").read_bytes() == before, "nothing is done again"


@pytest.mark.parametrize("suite", SUITES)
def test_keys_are_those_of_the_rows(suite: str, files: Path, smollm2_tokenizer: Any) -> None:
    given: dict[str, dict[str, Any]] = {
        "ruler": {"lengths": [512], "tasks": ["niah_single_1"], "samples": 2},
        "needle": {"lengths": [512], "tasks": ["needle", "multi_key"], "depths": [0, 0.25], "samples": 1},
        "retrieval": {"lengths": [512], "samples": 1},
        "turns": {"lengths": [900], "samples": 2, "turns": 3},
        "fidelity": {"prompts": ["The grass.", "The sky is blue. " * 30, "Here we go."], "new_tokens": 4},
        "ppl": {"lengths": [160], "samples": 2, "text": "text.txt"},
    }
    if suite == "speed":
        return  # its items are prompts of several lengths, which give a row for each repeat
    task = suite_of(suite, **given[suite])
    chosen, config = settings(task, smollm2_tokenizer)
    assert chosen is smollm2_tokenizer and "chat" not in config
    for cell in task.cells(chosen):
        items = list(task.of_cell(chosen, cell))
        assert [tuple(item.keys) for item in items] == list(cell.items)
        assert all(item.length == cell.length for item in items)


def test_conversations_count_as_one_where_a_cell_is_stopped() -> None:
    task = suite_of("turns", lengths=[4096], tasks=["kv"], turns=2, samples=9)
    [cell] = task.cells(None)
    stops, keys = Stops(prompts=8, loss_above=30), cell.keys()
    rows = [{"key": key, "method": "dense", "score": 1.0} for key in keys]
    bad = [{"key": key, "method": "h2o", "score": float(key == keys[1])} for key in keys]
    assert "measured 93.8" in stops.decide(cell, rows + bad)["h2o"], "one of 16 turns is right"
    few = [row for row in bad if row["key"] in cell.keys(7)]
    assert not stops.decide(cell, rows + few), "fourteen rows, but no eight conversations"


def test_speed_waits_for_a_measurement_on_the_same_machine(files: Path, model: Any) -> None:
    [grid] = plan(files, "speed").grids
    setup = tiny.setup(model, grid.methods, files / "out", config=grid.task.config)
    inside, go, done = threading.Event(), threading.Event(), threading.Event()
    job: Any = SimpleNamespace(decide=lambda make: make())

    def other() -> None:
        with speed_module.alone(job):
            inside.set()
            go.wait(60)

    def mine() -> None:
        grid.task.run(setup, grid.task.draw(tiny.CharTokenizer()))
        done.set()

    first = threading.Thread(target=other)
    first.start()
    assert inside.wait(60)
    with pytest.warns(UserWarning, match="Another process measures speed on this machine"):
        second = threading.Thread(target=mine)
        second.start()
        assert not done.wait(2) and not read(files / "out")[1]
        go.set()
        second.join(60)
    assert done.is_set() and len(read(files / "out")[1]) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("lengths: [96, 64]", "prompts: [prompts.jsonl]", "lengths of grid 1 is missing"),
        ("samples: 2", "repeats: 2", "repeats was given, which the suite ppl does not have"),
        ("samples: 2", "chat: false", "these prompts have no chat format"),
        ("new_tokens: 20", "new_tokens: 64", "The length 64 is too short to score its last 64"),
    ],
)
def test_a_wrong_option_is_one_sentence(files: Path, old: str, new: str, says: str) -> None:
    path = files / "sweep.yaml"
    path.write_text("grids:" + GRID.format(suite="ppl", options=OPTIONS["ppl"]).replace(old, new))
    with pytest.raises(FarspanError, match=says):
        read_sweep(path, files)
