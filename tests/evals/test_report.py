"""Rows to summaries, tables and pictures, against values worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from farspan.evals import pictures, report, summary, tables
from farspan.evals.results import Results, read

SPARSE = "recycled:k=8,stride=4"


def row(
    method: str, task: str, index: int, *, score: float, nll: float | None, length: int = 1024, **extra: Any
) -> dict:
    dense = method == "dense"
    return {
        "key": f"x/{task}/{length}/{extra.get('depth')}/{index}",
        "suite": "needle" if extra else "ruler",
        "task": task,
        "length": length,
        "index": index,
        "extra": extra,
        "recipe": {"seed": index},
        "method": method,
        "score": score,
        "nll": nll,
        "gold_tokens": 4,
        "density": {"prefill": 1.0, "decode": 1.0 if dense else 0.25},
        "kv_read": 1.0 if dense else 0.3,
        "seconds": {"prefill": 2.0, "decode": 0.5},
        "steps": 10,
        "batch": 4,
        "fallbacks": {},
    }


def config(suite: str, *methods: str) -> dict:
    return {"suite": suite, "model": "tiny", "dtype": "float32", "methods": list(methods), "versions": {}}


@pytest.fixture
def ruler() -> dict[str, Any]:
    rows = []
    for task, drop in (("niah_single_1", 0.0), ("niah_single_2", 1.0)):
        for index in range(3):
            rows.append(row("dense", task, index, score=1.0, nll=0.5))
            rows.append(row(SPARSE, task, index, score=1.0 - drop, nll=0.5 + drop + index))
    return summary.summarise(config("ruler", "dense", SPARSE), rows)


def test_cells_pair_each_sample_with_dense(ruler: dict[str, Any]) -> None:
    cell = next(c for c in ruler["cells"] if c["method"] == SPARSE and c["task"] == "niah_single_2")
    assert cell["n"] == 3 and cell["score"] == 0.0
    assert cell["nll_diff"] == {"mean": 2.0, "low": None, "high": None, "n": 3, "reason": "too few"}
    assert cell["score_diff"]["mean"] == -1.0
    assert cell["step_ms"] == pytest.approx(0.5 * 4 / 10 * 1e3)  # a sample's share times the batch, per step


def test_overall_is_the_mean_over_tasks_and_groups_keep_noise_apart(ruler: dict[str, Any]) -> None:
    found = next(o for o in ruler["overall"] if o["method"] == SPARSE)
    assert found["score"] == 0.5
    assert found["groups"] == {"essay and needles": 0.0, "noise": 1.0, "word lists": None, "documents": None}
    averages = {"retrieval": 0.5, "multi-hop": None, "aggregation": None, "question answering": None}
    assert found["categories"] == averages
    # differences 0, 1, 2 and 1, 2, 3: s²/n = 1/3 twice, se = sqrt(2/3)/2, t(0.975, 4) = 2.776445
    assert found["nll_diff"]["mean"] == pytest.approx(1.5)
    assert found["nll_diff"]["high"] == pytest.approx(1.5 + 2.776445 * 0.408248, abs=1e-4)
    score = found["score_diff"]
    assert -1 <= score["low"] < score["mean"] == -0.5 < score["high"]
    assert found["decode_density"] == 0.25
    base = next(o for o in ruler["overall"] if o["method"] == "dense")
    for name in ("nll_diff", "score_diff"):  # not a measurement: no interval
        assert (base[name]["mean"], base[name]["low"]) == (0.0, None)
        assert base[name]["reason"] == "compared with itself"


def test_unequal_cells_weigh_the_same() -> None:
    rows = [row("dense", "vt", i, score=1.0, nll=1.0) for i in range(9)]
    rows.append(row("dense", "cwe", 0, score=0.0, nll=1.0))
    assert summary.summarise(config("ruler", "dense"), rows)["overall"][0]["score"] == 0.5


def test_ruler_tables(ruler: dict[str, Any]) -> None:
    lines = tables.ruler_table(ruler).splitlines()
    assert lines[0] == "| method | 1K score | 1K ΔNLL (95 %) | 1K read |"
    assert lines[2] == "| `dense` | 100.0 | – | 100 / 100.0 % |"
    assert lines[3] == f"| `{SPARSE}` | 50.0 | +1.500 [+0.367, +2.633] | 100 / 25.0 % |"
    by_task = tables.task_table(ruler, 1024).splitlines()
    assert by_task[0] == "| method | niah_single_1 | niah_single_2 | mean |"
    assert by_task[3] == f"| `{SPARSE}` | 100 (+1.00) | 0 (+2.00) | 50.0 |"
    assert tables.group_table(ruler).splitlines()[0] == "| method | essay and needles, 1K | noise, 1K |"
    assert "30.0 %" in tables.cost_table(ruler)
    assert "Samples a cell: 3." in report.notes(ruler)


def test_tasks_that_dense_always_or_never_solves_are_left_out_of_the_reach_table() -> None:
    rows = []
    for index, solved in enumerate((1.0, 0.0, 1.0)):
        for task, score in (("vt", 1.0), ("cwe", 0.0), ("fwe", solved)):
            rows.append(row("dense", task, index, score=score, nll=0.5))
            if index < 2:  # fewer prompts: compared with dense on these alone
                rows.append(row(SPARSE, task, index, score=0.0, nll=0.75))
    data = summary.summarise(config("ruler", "dense", SPARSE), rows)
    dense, sparse = data["in_reach"]
    assert {task for task, score in sparse["tasks"].items() if score is not None} == {"fwe"}
    assert (dense["score"], dense["n"], sparse["score"], sparse["n"]) == (pytest.approx(2 / 3), 3, 0.0, 2)
    assert sparse["baseline_score"] == 0.5 and sparse["score_diff"]["mean"] == -0.5
    lines = tables.reach_table(data).splitlines()
    assert lines[2] == "| `dense` | 1K | 1 | 3 | 66.7 | 66.7 | – | – | 100 / 100.0 % |"
    assert lines[3].startswith(
        f"| `{SPARSE}` | 1K | 1 | 2 | 0.0 | 50.0 | -50.0 (too few) | +0.250 (too few) |"
    )
    assert data["in_reach_chosen_by"] == "dense's mean score on the same prompts"
    notes = report.notes(data)
    assert "In reach: tasks chosen by dense's own score on these same prompts." in " ".join(notes)
    assert "too few: an interval needs 6 prompts." in notes


def test_a_difference_beyond_its_interval_is_starred() -> None:
    rows = []
    for index in range(7):
        rows.append(row("dense", "vt", index, score=1.0, nll=0.5))
        rows.append(row(SPARSE, "vt", index, score=1.0, nll=1.5 + 0.01 * index))
    data = summary.summarise(config("ruler", "dense", SPARSE), rows)
    assert "100 (+1.03*)" in tables.task_table(data, 1024)


def test_equal_differences_have_no_interval_and_equal_scores_one_with_a_width() -> None:
    rows = [row(m, "vt", i, score=0.5, nll=n) for i in range(6) for m, n in (("dense", 0.5), (SPARSE, 0.75))]
    data = summary.summarise(config("ruler", "dense", SPARSE), rows)
    line = tables.reach_table(data).splitlines()[3]
    # of six zeros with -1 and +1: s² = 2/7, s/sqrt(8) = 0.188982, t(0.975, 7) = 2.364624 (tables)
    assert "| +0.0 [-44.7, +44.7] | +0.250 (no spread) |" in line
    notes = report.notes(data, short=True)
    assert "no spread: all differences are equal, so no interval can be given." in notes


def test_without_dense_there_is_no_difference_and_the_reader_is_told() -> None:
    data = summary.summarise(config("ruler", SPARSE), [row(SPARSE, "vt", 0, score=1.0, nll=0.5)])
    assert "| – |" in tables.ruler_table(data).splitlines()[2]
    assert any("Add the method dense" in note for note in report.notes(data))


def test_a_likelihood_that_is_not_finite_is_counted_not_averaged() -> None:
    rows = [row("dense", "vt", i, score=1.0, nll=0.5) for i in range(2)]
    rows += [row(SPARSE, "vt", 0, score=1.0, nll=None), row(SPARSE, "vt", 1, score=1.0, nll=0.75)]
    data = summary.summarise(config("ruler", "dense", SPARSE), rows)
    found = data["methods"][1]["nll_diff"]
    assert found == {"mean": 0.25, "low": None, "high": None, "n": 1, "reason": "too few"}
    assert any(note.startswith("1 likelihoods were not finite") for note in report.notes(data))


@pytest.fixture
def needle() -> list[dict]:
    rows = []
    for depth in (1.0, 0.0, 0.5):  # in no order
        for length in (2048, 1024):
            for index in range(2):
                score = 1.0 if depth == 0.0 or (depth == 0.5 and length == 1024 and index == 0) else 0.0
                rows.append(row("dense", "needle", index, score=score, nll=1.0, length=length, depth=depth))
    return rows


def test_heatmap_has_the_start_of_the_text_on_top(
    needle: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = summary.summarise(config("needle", "dense"), needle)
    shown: dict[str, Any] = {}
    real = Axes.imshow

    def imshow(self: Axes, grid: Any, **kwargs: Any) -> Any:
        shown.update(grid=grid, axes=self, **kwargs)
        return real(self, grid, **kwargs)

    monkeypatch.setattr(Axes, "imshow", imshow)
    pictures.heatmap(data, "dense", tmp_path / "heat.png")
    assert shown["grid"] == [[1.0, 1.0], [0.5, 0.0], [0.0, 0.0]]  # [depth][length]
    assert shown["origin"] == "upper" and (shown["vmin"], shown["vmax"]) == (0, 1)
    assert shown["cmap"] == "RdYlGn"  # 0 red, 1 green
    axes = shown["axes"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 %", "50 %", "100 %"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "2K"]
    low, high = axes.get_ylim()
    assert low > high  # the y axis runs downwards: row 0 is on top
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_gets_its_tables_and_pictures(needle: list[dict], tmp_path: Path) -> None:
    with Results(tmp_path / "n", config("needle", "dense") | {"suite": "needle"}) as results:
        results.append(needle)
        names = report.write(results, summary.summarise(results.config, results.rows))
    assert names == ["needle.md", "heatmap_00_dense.png"]
    assert all((tmp_path / "n" / name).stat().st_size for name in names)
    assert "| `dense` | 12 | 41.7 |" in (tmp_path / "n" / "needle.md").read_text()

    rows = [row(m, "vt", 0, score=1.0, nll=0.5, length=n) for m in ("dense", SPARSE) for n in (512, 1000)]
    with Results(tmp_path / "r", config("ruler", "dense", SPARSE)) as results:
        results.append(rows)
        names = report.write(results, summary.summarise(results.config, results.rows))
    assert names == ["ruler.md", "ruler.png"]
    text = (tmp_path / "r" / "ruler.md").read_text()
    assert "512 score" in text and "1000 score" in text and "1 of RULER's 13 tasks" in text
    assert len(read(tmp_path / "r")[1]) == 4


def test_effective_length_is_the_largest_that_keeps_85_percent() -> None:
    scores = {"dense": [1.0, 1.0, 0.9, 0.8], SPARSE: [0.4, 0.1, 0.35, 0.2], "quest:k=8": [0.0, 0.0, 1.0, 1.0]}
    rows = [
        row(method, task, index, score=score, nll=0.5, length=length)
        for method, by_length in scores.items()
        for length, score in zip((1024, 2048, 4096, 8192), by_length, strict=True)
        for task in ("vt", "fwe")
        for index in range(4)
    ]
    rows = [r for r in rows if (r["task"], r["length"]) != ("fwe", 4096)]  # not there at every length
    data = summary.summarise(config("ruler", *scores), rows)
    found = {line["method"]: line["effective_length"] for line in data["methods"]}
    assert found["dense"] == {"length": 4096, "of": 8192, "base_score": 1.0, "score": 0.9, "tasks": 1}
    assert found[SPARSE]["length"] == 4096, "2K is below 85 %, and 4K above"
    assert found["quest:k=8"] is None, "85 % of nothing"
    assert tables.effective_table(data) == (
        "| method | effective length | score at 1K | score there |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| `dense` | 4K | 100.0 | 90.0 |\n"
        f"| `{SPARSE}` | 4K | 40.0 | 35.0 |\n"
    )
    short = summary.summarise(config("ruler", "dense"), [r for r in rows if r["length"] == 1024])
    assert short["methods"][0]["effective_length"] is None and tables.effective_table(short) == ""
    [said] = tables.effective_note(data)
    assert said.endswith(f": dense 4K; {SPARSE} 4K.") and tables.effective_note(short) == []


def test_score_intervals_stay_within_the_scores_bounds() -> None:
    rows = [row("dense", "vt", i, score=1.0, nll=0.5) for i in range(10)]
    rows += [row("dense", "fwe", i, score=float(i % 2), nll=0.5) for i in range(10)]
    data = summary.summarise(config("ruler", "dense"), rows)
    cells = {cell["task"]: cell["score_interval"] for cell in data["cells"]}
    assert cells["vt"]["mean"] == 1.0 and cells["vt"]["high"] == 1.0 and 0.6 < cells["vt"]["low"] < 0.9
    # 10 answers and one pseudo-observation at either bound: 0.5 ± t(11) · s / √12, s² = 12 / 4 / 11
    half = 2.2009852 * (3 / 11 / 12) ** 0.5
    assert cells["fwe"]["low"] == pytest.approx(0.5 - half) and cells["fwe"]["high"] == pytest.approx(
        0.5 + half
    )
    assert "| fwe | 50.0 [16.8, 83.2] |" in tables.interval_table(data, 1024)
    assert data["overall"][0]["score_interval"]["mean"] == pytest.approx(0.75)


def test_the_terminal_table(ruler: dict[str, Any]) -> None:
    assert report.terminal_table(ruler).text(80).splitlines() == [
        "ruler · tiny",
        "method",
        "  length  n  score     ΔNLL ± 95 %     read %  prefill s  ms/step",
        "─" * 65,
        "dense",
        "      1K  6  100.0               –  100/100.0       2.00    200.0",
        SPARSE,
        "      1K  6   50.0  +1.500 ± 1.133   100/25.0       2.00    200.0",
        "read: share of keys read in prefill / decode. 2 of RULER's 13 tasks.",
    ]
    assert len(report.terminal_table(ruler).text(86).splitlines()) == 6  # one line a row
