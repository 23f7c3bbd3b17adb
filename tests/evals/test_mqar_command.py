"""`farspan eval mqar`: its folder, how it goes on after a stop, its table and plot, and bad input."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farspan.evals.mqar import report, run

Command = Callable[..., tuple[int, str, str]]
TINY = shlex.split(
    "--settings 24x3,16x2 --dim 16 --vocabulary 32 --samples 64 --test-samples 32 --epochs 2 "
    "--batch-tokens 384 --lr 1e-2,1e-3 --seeds 0,1"
)


@pytest.fixture
def command(farspan_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `farspan eval mqar` in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: farspan_command("eval", "mqar", *arguments, columns=120)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_a_stopped_comparison_goes_on_and_grows(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, trained = tmp_path / "out", []
    true = run.train

    def stopping(one: Any, *args: Any, **named: Any) -> Any:
        trained.append(one)
        if len(trained) == 6:
            raise KeyboardInterrupt
        return true(one, *args, **named)

    monkeypatch.setattr(run, "train", stopping)
    given = (*TINY, "--apart", "--mixers", "attention", "--out", str(out))
    code, _, err = command(*given)
    assert code == 130 and "Run the same command to go on" in err and len(rows(out)) == 5
    assert json.loads((out / "summary.json").read_text())["unfinished"] == [
        f"attention {name}" for name in ("16x2/d16/seed1", "24x3/d16/seed0", "24x3/d16/seed1")
    ]
    code, table, err = command(*given)
    assert code == 0 and "reduced" in table and "attention" in table, err
    assert len(trained) == 6 + 3 and len(rows(out)) == 8, "a mixer, 2 settings, 2 seeds, 2 rates"
    code, said, err = command(
        *TINY, "--apart", "--mixers", "attention,base_conv:length=3+attention", "--out", str(out), "--json"
    )
    assert code == 0 and len(trained) == 9 + 8, err
    data = json.loads(said)
    assert data["complete"] and len(data["cells"]) == 4
    for cell in data["cells"]:
        of = [
            r
            for r in rows(out)
            if (r["method"], str(r["key"]).split("/")[0]) == (cell["mixer"], cell["setting"])
        ]
        best = [max(r["accuracy"][cell["setting"]] for r in of if r["seed"] == seed) for seed in (0, 1)]
        assert cell["accuracy"] == pytest.approx(sum(best) / 2)
        assert (cell["low"], cell["high"]) == (min(best), max(best))
    assert (out / "mqar.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "mqar.md").read_text()
    assert "64 sequences an epoch (published 100,000)" in page and "| `attention` | 16 |" in page
    assert not list(out.glob("checkpoints/*"))
    code, _, err = command(*given, "--epochs", "3")
    assert code == 2 and "epochs 2 there, 3 here" in err


def test_a_solved_cell_ends_its_sweep_unless_all_rates_are_asked_for(
    command: Command, tmp_path: Path
) -> None:
    given = (*TINY, "--mixers", "attention", "--stop", "0", "--json")
    code, said, err = command(*given, "--out", str(tmp_path / "a"))
    assert code == 0 and json.loads(said)["complete"] and len(rows(tmp_path / "a")) == 2, err
    code, said, err = command(*given, "--all-rates", "--out", str(tmp_path / "b"))
    assert code == 0 and len(rows(tmp_path / "b")) == 2 * 2, err


def test_published_sizes_are_not_called_reduced() -> None:
    published = {**report.PUBLISHED, "all_rates": True}
    assert report.reduced(published) == []
    assert len(report.reduced({**published, "epochs": 8, "all_rates": False})) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--mixers", "nothing"), "There is no sequence mixer 'nothing'"),
        (("--mixers", ","), "MQAR was given no mixers"),
        (("--settings", "64x17"), "The setting 64x17 has no room for its queries"),
        (("--settings", "64"), "A setting is LENGTHxPAIRS such as 64x4; got '64'"),
        (("--vocabulary", "33"), "A vocabulary of 33 tokens does not fit 4 pairs"),
        (("--vocabulary", "6"), "A vocabulary of 6 tokens does not fit 4 pairs"),
        (("--heads", "3"), "3 heads do not divide a model of 64 numbers"),
        (("--filler", "one"), "The filler is zero or random; got 'one'"),
        (("--lr", "fast"), "--lr takes numbers such as 1e-3; got fast"),
        (("--mixers", "attention:k=3"), "attention takes no parameters; got 'attention:k=3'"),
        (("--mixers", "base_conv:length=0"), "at least 1 token; got a length of 0"),
        (("--dim", "1T"), "are too large: give at most 16,384 numbers"),
        (("--settings", "999999999x1"), "Sequences are of at most 1,048,576 tokens"),
        (("--seeds", "1000000000000000"), "Seeds are at least 0 and below 2^31"),
        (("--device", "meta"), "--device meta is not there"),
        (("--lr", "0"), "Learning rates are above 0 and below 1; got [0.0]"),
        (("--seeds", "-1"), "Seeds are at least 0"),
        (("--dropout", "2"), "dropout is from 0 to 1; got 2.0"),
        (("--device", "nowhere"), "--device nowhere is not there"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    command: Command, tmp_path: Path, arguments: tuple[str, str], sentence: str
) -> None:
    code, out, err = command("--settings", "64x4", *arguments, "--out", str(tmp_path / "out"))
    assert code == 2 and sentence in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()
