"""Which method is recommended: the bound by hand, how often it is wrong, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from farspan import FarspanError
from farspan.evals.folders import Found, read_folders
from farspan.evals.recommend import BEYOND, OPEN, WITHIN, recommend
from farspan.evals.words import recommendation

from . import folder


def made(tmp_path: Path, scores: dict[str, list[float]], *, dense: float = 1.0, **changes: Any) -> Found:
    """One task, one prompt for each score of a method; dense has the same score on all of them."""
    count = max(map(len, scores.values()))
    rows = [folder.row("dense", "vt", i, dense) for i in range(count)]
    rows += [folder.row(m, "vt", i, score) for m, found in scores.items() for i, score in enumerate(found)]
    folder.write(tmp_path / "a", rows, **changes)
    return read_folders([tmp_path / "a"])


def test_the_limit_by_hand(tmp_path: Path) -> None:
    # 40 prompts of which 4 are lost, and one more at each end of the scale: mean 4/42.
    [of] = recommend(made(tmp_path, {"quest": [0.0] * 4 + [1.0] * 36}), max_drop=20)
    values = [1.0] * 4 + [0.0] * 36 + [1.0, -1.0]
    limit = np.mean(values) + t.ppf(0.95, 41) * np.std(values, ddof=1) / math.sqrt(42)
    assert of.chosen is not None and of.chosen.method == "quest"
    assert of.chosen.loss == pytest.approx(0.1) and of.chosen.most == pytest.approx(limit, abs=1e-9)
    assert (
        recommend(made(tmp_path, {"quest": [0.0] * 4 + [1.0] * 36}), max_drop=100 * limit - 0.01)[0].chosen
        is None
    )


def test_the_cheapest_of_those_within_the_bound(tmp_path: Path) -> None:
    good, bad = [1.0] * 60, [0.0] * 60
    rows = [folder.row("dense", "vt", i, 1.0) for i in range(60)]
    for method, scores, share in (
        ("a", good, 0.5),
        ("b", good, 0.1),
        ("c", bad, 0.01),
        ("oracle:k=4", good, 0.01),
    ):
        density = {"density": {"prefill": 1.0, "decode": share}}
        rows += [folder.row(method, "vt", i, score, **density) for i, score in enumerate(scores)]
    [of] = recommend(read_folders([folder.write(tmp_path, rows)]), max_drop=10)
    assert of.chosen is not None and of.chosen.method == "b"
    assert {one.method: one.verdict for one in of.candidates} == {
        "a": WITHIN,
        "b": WITHIN,
        "c": BEYOND,
        "oracle:k=4": WITHIN,
    }
    assert of.chosen.patch == 'farspan.patch(model, "b")'


def test_few_prompts_are_not_ruled_out_and_many_more_decide(tmp_path: Path) -> None:
    [of] = recommend(made(tmp_path, {"quest": [1.0] * 20}), max_drop=2)
    [one] = of.candidates
    assert of.chosen is None and one.verdict == OPEN and one.times is not None
    enough = [1.0] * 20 * one.times
    assert recommend(made(tmp_path, {"quest": enough}), max_drop=2)[0].chosen is not None
    [of] = recommend(made(tmp_path, {"quest": [1.0] * 18 + [0.0] * 2}), max_drop=2)
    assert of.candidates[0].verdict == OPEN and of.candidates[0].times is None
    [of] = recommend(made(tmp_path, {"quest": [1.0] * 5}), max_drop=50)
    assert of.chosen is None and of.candidates[0].most is None, "five prompts give no interval"


def test_a_method_that_loses_more_passes_in_about_one_of_twenty() -> None:
    """The true loss is the bound itself: it is called within as rarely as the confidence says."""
    from farspan.evals.stats import stratified_interval

    rng, passed, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        groups = [list((rng.random(50) < rate).astype(float)) for rate in (0.02, 0.1, 0.24)]
        found = stratified_interval(groups, bound=1, confidence=0.9)
        assert found is not None and found.high is not None
        passed += found.high <= 0.12
    assert passed / trials < 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)


def test_tasks_at_which_dense_scores_nothing_prove_nothing(tmp_path: Path) -> None:
    dense = [folder.row("dense", task, i, float(task == "vt")) for task in ("vt", "cwe") for i in range(40)]
    lost = [folder.row("quest", task, i, 0.0) for task in ("vt", "cwe") for i in range(40)]
    folder.write(tmp_path / "a", [*dense, *lost])
    [of] = recommend(read_folders([tmp_path / "a"]), max_drop=60)
    assert of.blind == ["cwe"] and of.chosen is None and of.candidates[0].loss == 1.0
    folder.write(tmp_path / "b", [row for row in [*dense, *lost] if row["task"] == "cwe"])
    [of] = recommend(read_folders([tmp_path / "b"]), max_drop=60)
    assert of.chosen is None and of.candidates == []
    assert "cannot show what a method loses" in recommendation(of)


def test_lengths_that_were_not_measured_are_refused(tmp_path: Path) -> None:
    found = made(tmp_path, {"quest": [1.0] * 200})
    with pytest.raises(FarspanError, match=r"Nothing was measured at 32768 tokens, only at 4096;"):
        recommend(found, length=32768)
    [of] = recommend(found, length=32768, max_drop=5, extrapolate=True)
    assert (of.length, of.asked) == (4096, 32768) and of.chosen is not None


def test_seconds_come_from_a_speed_folder_of_the_same_model_and_length(tmp_path: Path) -> None:
    made(tmp_path, {"slow": [1.0] * 200, "fast": [1.0] * 200, "unknown": [1.0] * 200})
    with pytest.raises(FarspanError, match="No seconds were measured for tiny at 4096 tokens"):
        recommend(read_folders([tmp_path]), by="seconds")
    speeds = [("unpatched", 10.0, 5.0), ("slow", 11.0, 5.0), ("fast", 6.0, 10.0)]
    rows = [folder.speed_row(method, 4096, *numbers) for method, *numbers in speeds]
    folder.write(tmp_path / "speed", rows, **folder.SPEED)
    [of] = recommend(read_folders([tmp_path]), by="seconds", max_drop=5)
    assert of.chosen is not None and (of.chosen.method, of.chosen.cost) == ("fast", 6.0 + 10 / 10.0)
    assert {one.method: one.saves for one in of.candidates} == {"fast": True, "slow": False, "unknown": False}


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"max_drop": -1}, "max_drop=-1"),
        ({"confidence": 1.0}, "confidence=1"),
        ({"confidence": float("nan")}, "confidence=nan"),
        ({"by": "money"}, "by=money"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(FarspanError, match=says):
        recommend(made(tmp_path, {"quest": [1.0] * 6}), **wrong)


def test_without_dense_there_is_nothing_to_compare(tmp_path: Path) -> None:
    folder.write(tmp_path, [folder.row("quest", "vt", 0, 1.0)])
    with pytest.raises(FarspanError, match="No folder has a method beside dense"):
        recommend(read_folders([tmp_path]))


def test_folders_of_the_same_settings_are_one_evaluation(tmp_path: Path) -> None:
    dense = [folder.row("dense", "vt", i, 1.0) for i in range(6)]
    folder.write(tmp_path / "a", [*dense, *(folder.row("a", "vt", i, 1.0) for i in range(6))])
    folder.write(tmp_path / "b", [*dense, *(folder.row("b", "vt", i, 1.0) for i in range(6))])
    folder.write(tmp_path / "c", dense, seed=2)
    joined, other = read_folders([tmp_path]).evaluations
    assert len(joined.rows) == 18 and joined.config["methods"] == ["dense", "a", "b"]
    assert len(other.rows) == 6
    assert [
        one.method for one in recommend(read_folders([tmp_path / "a", tmp_path / "b"]))[0].candidates
    ] == ["a", "b"]


@pytest.mark.parametrize("line", ['{"key": "x"', '{"key": 3, "method": "dense", "recipe": {}}', "[]"])
def test_a_broken_line_is_one_sentence(tmp_path: Path, line: str) -> None:
    folder.write(tmp_path, [folder.row("dense", "vt", 0, 1.0)])
    path = tmp_path / "samples.jsonl"
    whole = path.read_text()
    path.write_text(f"{line}\n{whole}")
    with pytest.raises(FarspanError, match=r"line 1 of .*samples\.jsonl is damaged"):
        read_folders([tmp_path])
    path.write_text(f"{whole}{line}")  # a line that is being written
    assert len(read_folders([tmp_path]).evaluations[0].rows) == 1


def test_folders_that_are_none(tmp_path: Path) -> None:
    for path, says in (
        (tmp_path / "x", "is not there"),
        (tmp_path, "has no results"),
        (Path(__file__), "is a file"),
    ):
        with pytest.raises(FarspanError, match=says):
            read_folders([path])
    (tmp_path / "samples.jsonl").write_text("")
    with pytest.raises(FarspanError, match=r"config\.json cannot be read|has no results yet"):
        read_folders([tmp_path])
