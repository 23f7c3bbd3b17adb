"""Results in MLflow, where FARSPAN_TRACKER=mlflow is set: one run a method, its figures by length. MLflow's
own variables (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME) say where runs are kept."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError


def track(out: Path, summary: Mapping[str, Any]) -> None:
    """Log a summary. Raises FarspanError for another tracker, and where MLflow is not installed."""
    name = os.environ.get("FARSPAN_TRACKER")
    if not name:
        return
    if name != "mlflow":
        raise FarspanError(f"FARSPAN_TRACKER is {name!r}; it can be mlflow. The results are in {out}.")
    try:
        mlflow = importlib.import_module(name)
    except ImportError as error:
        raise FarspanError(
            f"FARSPAN_TRACKER needs `pip install mlflow`. The results are in {out}."
        ) from error
    rows, about = summary.get("overall", []), {"model": summary["model"], "folder": str(out)}
    for method in dict.fromkeys(row["method"] for row in rows):
        with mlflow.start_run(run_name=f"{summary['suite']} {method}"):
            mlflow.log_params({"suite": summary["suite"], "method": method, **about})
            for row in rows:
                if row["method"] == method:
                    mlflow.log_metrics(figures(row), step=row["length"])


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row; of a difference its mean."""
    flat = {key: value.get("mean") if isinstance(value, Mapping) else value for key, value in row.items()}
    return {key: float(value) for key, value in flat.items() if isinstance(value, int | float)}
