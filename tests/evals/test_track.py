"""The hook that logs results to MLflow, with a stand-in for it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farspan import FarspanError
from farspan.evals.track import track

SUMMARY = {
    "suite": "ruler",
    "model": "tiny",
    "overall": [
        {"method": "dense", "length": 1024, "score": 1.0, "nll_diff": {"mean": 0.0}, "tasks": {"vt": 1.0}},
        {"method": "quest:k=64", "length": 1024, "score": 0.5, "nll_diff": {"mean": 0.25}, "kl": None},
        {"method": "quest:k=64", "length": 2048, "score": 0.25, "nll_diff": {"mean": 0.5}, "kl": None},
    ],
}


def test_each_method_is_a_run_with_its_figures_by_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    stand_in = SimpleNamespace(
        start_run=lambda run_name: (calls.append(("begin", run_name)), nullcontext())[1],
        log_params=lambda about: calls.append(("about", about["method"], about["model"])),
        log_metrics=lambda values, step: calls.append((step, values)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    monkeypatch.setenv("FARSPAN_TRACKER", "mlflow")
    track(tmp_path, SUMMARY)
    assert calls == [
        ("begin", "ruler dense"),
        ("about", "dense", "tiny"),
        (1024, {"length": 1024.0, "score": 1.0, "nll_diff": 0.0}),
        ("begin", "ruler quest:k=64"),
        ("about", "quest:k=64", "tiny"),
        (1024, {"length": 1024.0, "score": 0.5, "nll_diff": 0.25}),
        (2048, {"length": 2048.0, "score": 0.25, "nll_diff": 0.5}),
    ]


def test_no_tracker_an_unknown_one_and_one_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FARSPAN_TRACKER", raising=False)
    track(tmp_path, SUMMARY)
    monkeypatch.setenv("FARSPAN_TRACKER", "notebook")
    with pytest.raises(FarspanError, match=r"is 'notebook'; it can be mlflow[.] The results are in"):
        track(tmp_path, SUMMARY)
    monkeypatch.setenv("FARSPAN_TRACKER", "mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(FarspanError, match=r"needs `pip install mlflow`[.] The results are in"):
        track(tmp_path, SUMMARY)
