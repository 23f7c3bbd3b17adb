"""Sweeps: killed at random moments, by two processes at once, refused, stopped early, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals.results import Results, read
from farspan.evals.run import ANSWER
from farspan.evals.run import run as evaluation
from farspan.evals.settings import versions
from farspan.evals.suites import suite_of
from farspan.evals.sweep.config import read as read_sweep
from farspan.evals.sweep.share import Shared, file_name
from farspan.evals.sweep.stops import Stops
from farspan.evals.sweep.work import Work, duration, seconds_left, sweep
from farspan.evals.task import Cell, settings

from . import folder, tiny

FOLDERS = Path(__file__).parents[2] / "docs" / "results"
SCRIPT = Path(__file__).with_name("sweeping.py")
CONFIG = """
grids:
  - suite: ruler
    models: [tiny]
    methods: [dense, "quest:k={k},dense_layers=0"]
    budgets: {k: [16]}
    lengths: [128]
    tasks: [vt, cwe, fwe]
    samples: 4
    batch_size: 2
"""
QUEST = "quest:k=16,dense_layers=0"


def comparable(out: Path) -> list[dict[str, Any]]:
    rows = [{n: v for n, v in row.items() if n != "seconds"} for row in read(out)[1]]
    return sorted(rows, key=lambda row: (row["method"], row["key"]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders whole, killed and pair of sweeping.py, and what it printed."""
    base = tmp_path_factory.mktemp("sweep")
    (base / "config.yaml").write_text(CONFIG)
    command = [sys.executable, str(SCRIPT), str(base), str(base / "config.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    (base / "printed.json").write_text(done.stdout)
    return base


@pytest.fixture
def whole(base: Path) -> Path:
    """The results folder of the sweep that nothing disturbed."""
    return base / "whole" / "ruler-tiny"


def test_killed_at_random_moments_it_ends_with_the_same_rows(base: Path, whole: Path) -> None:
    left = json.loads((base / "printed.json").read_text())["left"]
    assert left and left == sorted(left), "no finished row is lost"
    again = base / "killed" / "ruler-tiny"
    assert comparable(again) == comparable(whole)
    assert len(read(again)[1]) == 3 * 4 * 2, "no row twice"
    cells = [json.loads((out / "summary.json").read_text())["cells"] for out in (again, whole)]
    scores = [[(cell["method"], cell["task"], cell["score"]) for cell in found] for found in cells]
    assert scores[0] == scores[1]
    assert read(again)[0]["planned"] == read(whole)[0]["planned"]


def test_two_processes_share_the_cells(base: Path, whole: Path) -> None:
    assert comparable(base / "pair" / "ruler-tiny") == comparable(whole)
    lines = [(base / f"pair-{name}.log").read_text().splitlines() for name in "ab"]
    done = [line.split()[1] for log in lines for line in log if " is done" in line]
    assert sorted(done) == ["ruler/cwe/128", "ruler/fwe/128", "ruler/vt/128"], "each cell by one process"


def shared(whole: Path, out: Path, **changes: Any) -> Shared:
    """The folder `out` with the settings of the whole sweep."""
    config = {name: value for name, value in read(whole)[0].items() if name not in ("sessions", "planned")}
    return Shared(out, config | changes, suite_of("ruler", lengths=[128]))


def test_a_changed_configuration_is_one_sentence(whole: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(FarspanError, match=r"another configuration \(seed 1 there, 2 here\)") as caught:
        shared(whole, whole, seed=2).begin({})
    assert "\n" not in str(caught.value)
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_what_a_killed_process_has_left_is_collected(whole: Path, tmp_path: Path) -> None:
    here, rows = shared(whole, tmp_path / "r"), read(whole)[1]
    cell = Cell(suite="ruler", task="vt", length=128).numbered(4)
    work = here.work / file_name(cell)
    with Results(work, here.settings, row=ANSWER, log=False) as results:
        results.append([row for row in rows if row["task"] == "vt"][:3])
    (work / "samples.jsonl").write_bytes(
        (work / "samples.jsonl").read_bytes()[:-9]
    )  # the third was being written
    with pytest.warns(UserWarning, match="is not whole"):
        here.begin({})
    assert len(here.rows()) == 2 and not work.exists()
    assert here.seed(cell) == work and len(read(work)[1]) == 2, "the evaluation goes on from these"
    other = shared(whole, tmp_path / "r", seed=2)
    with pytest.raises(FarspanError, match="another configuration"):
        other.collect(work, {})
    assert len(here.rows()) == 2


def test_a_corrupted_line_is_named(whole: Path, tmp_path: Path) -> None:
    here = shared(whole, tmp_path / "r")
    here.begin({})
    here.collect(here.seed(Cell(suite="ruler", task="vt", length=128).numbered(4)), {})
    (here.out / "samples.jsonl").write_text('{"key": 3}\n' + json.dumps(read(whole)[1][0]) + "\n")
    for look in (here.rows, lambda: here.begin({}), lambda: here.collect(here.work, {})):
        with pytest.raises(FarspanError, match=r"line 1 of .*samples\.jsonl is damaged"):
            look()


def test_a_full_disk_loses_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, rows = shared(whole, tmp_path / "r"), read(whole)[1]
    here.begin({})
    work = here.seed(Cell(suite="ruler", task="vt", length=128).numbered(4))
    with Results(work, here.settings, row=ANSWER, log=False) as results:
        results.append(rows[:2])

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("farspan.evals.results.os.write", full)
    with pytest.raises(FarspanError, match="the disk is full"):
        here.collect(work, {})
    monkeypatch.undo()
    assert not here.rows() and len(read(work)[1]) == 2
    here.begin({})
    assert list(here.rows().values()) == rows[:2]


def test_results_long_goes_on_from_the_recorded_rows(tmp_path: Path) -> None:
    """The committed folder and file: nothing recorded changes, and nothing of it is asked for again."""
    recorded = FOLDERS / "ruler_long"
    shutil.copytree(recorded, tmp_path / "ruler_long")
    config, rows = read(recorded)
    (tmp_path / "ruler_long" / "config.json").write_text(json.dumps(config | {"versions": versions()}))
    grid = read_sweep(FOLDERS / "long.yaml", tmp_path).grids[0]
    _, config_of = settings(grid.task, SimpleNamespace(chat_template=None))
    config_of |= {
        "model": grid.model,
        "dtype": grid.dtype,
        "methods": grid.methods,
        "recipes": config["recipes"],
    }
    shared = Shared(tmp_path / "ruler_long", config_of, grid.task)
    shared.begin({})
    assert (tmp_path / "ruler_long" / "samples.jsonl").read_bytes() == (
        recorded / "samples.jsonl"
    ).read_bytes()
    work: Any = Work(grid=grid, setup=None, shared=shared, stops=None, say=print)  # type: ignore[arg-type]
    missing = [one for cell in grid.task.cells(None) for one in work._missing(cell, shared.rows())]
    assert not set(missing) & {(row["key"], row["method"]) for row in rows}
    asked = {(key, m) for cell in grid.task.cells(None) for key in cell.keys(1) for m in grid.methods}
    assert len(asked) - len(missing) == sum(row["length"] == 16384 for row in rows)


def rows_of(method: str, scores: list[float]) -> list[dict[str, Any]]:
    return [folder.row(method, "vt", i, score) for i, score in enumerate(scores)]


def test_hopeless_cells_end_early() -> None:
    cell = Cell(suite="ruler", task="vt", length=4096).numbered(99)
    stops = Stops(prompts=8, dense_below=5, loss_above=30)
    good, bad = rows_of("a", [1.0] * 8), rows_of("b", [0.0] * 8)
    ended = stops.decide(cell, rows_of("dense", [1.0] * 8) + good + bad)
    assert list(ended) == ["b"] and "b stopped after 8 prompts, because it loses more than 30" in ended["b"]
    dense = rows_of("dense", [0.0] * 8)
    ended = stops.decide(cell, dense + good)
    assert set(ended) == {"dense", "a"} and "because dense scores 0.0" in ended["a"]
    assert stops.decide(cell, dense[:7] + bad) == {}, "not before all of its first prompts are there"
    later = [folder.row("dense", "vt", i, 1.0) for i in range(8, 99)]
    assert set(stops.decide(cell, dense + good + later)) == {"dense", "a"}, "later prompts change nothing"


def test_time_left() -> None:
    rows = [folder.row("dense", "vt", i, 1.0) for i in range(2)]  # 2 seconds each at 4,096 tokens
    cells = {Cell(suite="ruler", task="vt", length=n): 10 for n in (4096, 16384)}
    assert seconds_left(cells, rows) == pytest.approx(10 * 2 + 10 * 2 * 4**1.5)
    assert [duration(s) for s in (20, 600, 7200)] == ["20 seconds", "10 minutes", "2.0 hours"]


def test_the_file_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(CONFIG.replace("{k: [16]}", "{k: [16, 32]}").replace("[128]", "[1K, 2048]"))
    [grid] = read_sweep(path, tmp_path).grids
    assert grid.methods == ["dense", QUEST, QUEST.replace("16", "32")]
    assert grid.task.lengths == [1024, 2048] and grid.folder == "ruler-tiny"


def test_each_storage_has_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a storage are those of an evaluation under it, and stand in no folder of another."""
    model, int8 = tiny.tiny_model(), "int8:group=16,window=16"
    drawn = [tiny.sample("vt", i) for i in range(2)]
    monkeypatch.setattr(suite_of("ruler", lengths=[128]).__class__, "of_cell", lambda *_: iter(drawn))
    path = tmp_path / "a.yaml"
    file = CONFIG.replace("[vt, cwe, fwe]", "[vt]").replace("samples: 4", "samples: 2")
    path.write_text(file + f'    storages: [device, "{int8}"]\n')

    def rows_of(name: str) -> list[Any]:
        return [(row["method"], row["key"], row["nll"]) for row in comparable(tmp_path / name)]

    def work(plan: Any) -> None:
        sweep(plan, lambda grid: (model, tiny.CharTokenizer()), lambda line: None)

    work(read_sweep(path, tmp_path))
    folders = ["ruler-tiny-device", "ruler-tiny-int8-group-16-window-16"]
    plain, rounded = map(rows_of, folders)
    assert [row[:2] for row in plain] == [row[:2] for row in rounded] and len(plain) == 4
    assert plain[0][2] != rounded[0][2] and plain[1][2] != rounded[1][2], "dense reads rounded keys"
    for name, storage in zip(folders, ("device", int8), strict=True):
        given = tiny.setup(model, ["dense", QUEST], tmp_path / f"eval-{name}", storage=storage)
        evaluation(given, drawn, batch_size=2)
        assert rows_of(f"eval-{name}") == rows_of(name)
        assert read(tmp_path / name)[0].get("storage") == (int8 if storage == int8 else None)
    path.write_text(file + f'    storages: ["{int8}"]\n    folder: ruler-tiny-device\n')
    with pytest.raises(FarspanError, match=r"another configuration \(storage null there, \"int8:group=16"):
        work(read_sweep(path, tmp_path))


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("grids:", "grid:", r"no field 'grid' \(did you mean grids\?\)"),
        ("tasks: [vt", "tasks: [vtt", "no ruler task 'vtt'"),
        ("[dense,", "[dens,", "dens"),
        ("{k: [16]}", "{n: [16]}", "has no list k"),
        ("[128]", "[four]", "lengths of grid 1 has 'four'"),
        ("samples: 4", "samples: many", "samples of grid 1 is 'many'; it must be a whole number"),
        ("samples: 4", "sample: 4", r"did you mean samples\?"),
        ("models: [tiny]", "models: tiny", "models of grid 1 is 'tiny'; it must be a list"),
        ("models: [tiny]", "models: [a, b]\n    folder: one", "one for several models"),
        (
            "models: [tiny]",
            "models: [tiny]\n    folder: 'x-{k}'",
            r"folder of grid 1 is 'x-{k}'; give a name",
        ),
        ("models: [tiny]", "models: [tiny]\n    storages: [int3]", "There is no storage 'int3'"),
        ("models: [tiny]", "models: [tiny]\n    storages: []", "storages of grid 1 is empty"),
        (
            "models: [tiny]",
            "models: [tiny]\n    storages: [int4, int8]\n    folder: x",
            "folder of grid 1 is one for several storages",
        ),
        ("models: [tiny]", "models: [3]", r"models of grid 1 is \[3\]; it must be a list of texts"),
        ("suite: ruler", "suite: rule", "suite of grid 1 is 'rule'; it is one of ruler, needle, retrieval"),
        ("suite: ruler", "suite: retrieval", "no retrieval task 'vt'"),
        ("samples: 4", "depths: [0.5]", "depths was given, which the suite ruler does not have"),
        ("grids:", "stop: {prompts: 2}\ngrids:", "prompts is at least 6"),
        ("grids:", "stop: {loss_above: 30}\ngrids:", "6 prompts cannot show"),
        ("grids:", "{", "is not YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(CONFIG.replace(old, new))
    with pytest.raises(FarspanError, match=says) as caught:
        read_sweep(path, tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))
