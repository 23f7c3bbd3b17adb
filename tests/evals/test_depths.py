"""True depths of needles in a folder: in summary.json, in its Markdown and on its heatmap's axis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from farspan.evals import depths, pictures, report, summary
from farspan.evals.results import Results


def rows(true: dict[float, list[float]]) -> list[dict[str, Any]]:
    """Rows of method dense at one length: for each depth asked for, its samples' true depths."""
    return [
        {
            "key": f"needle/needle/1024/depth={depth:g}/{index}",
            "method": "dense",
            "suite": "needle",
            "task": "needle",
            "length": 1024,
            "index": index,
            "extra": {"depth": depth, "true_depth": found} if found >= 0 else {"depth": depth},
            "recipe": {},
            "score": 1.0,
            "nll": 1.0,
            "gold_tokens": 3,
            "density": {"prefill": 1.0, "decode": 1.0},
            "kv_read": 1.0,
            "seconds": {"prefill": 1.0, "decode": 1.0},
            "batch": 1,
            "steps": 1,
            "fallbacks": {},
        }
        for depth, places in true.items()
        for index, found in enumerate(places)
    ]


CONFIG = {"suite": "needle", "model": "tiny", "dtype": "float32", "methods": ["dense"], "seed": 1}
UNKNOWN = -1.0  # a row written before true depths were recorded


def test_the_folder_states_true_depths_and_the_largest_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = []
    real = Axes.set_yticks

    def set_yticks(self: Axes, at: Any, names: Any = None, **how: Any) -> Any:
        labels.append(names)
        return real(self, at, names, **how)

    monkeypatch.setattr(Axes, "set_yticks", set_yticks)
    with Results(tmp_path, CONFIG) as results:
        results.append(rows({0: [0, 0], 0.25: [0.22, 0.26, UNKNOWN], 0.5: [0.501, 0.503], 1: [UNKNOWN]}))
        data = summary.summarise(results.config, results.rows)
        results.write_summary(data)
        report.write(results, data)
    cells = json.loads((tmp_path / "summary.json").read_text())["cells"]
    found = {cell["depth"]: (cell.get("true_depth"), cell.get("depth_error")) for cell in cells}
    assert found[0] == (0, 0) and found[1] == (None, None)
    assert found[0.25] == (pytest.approx(0.24), pytest.approx(0.03))
    assert found[0.5] == (pytest.approx(0.502), pytest.approx(0.003))
    text = (tmp_path / "needle.md").read_text()
    assert "Depth asked → mean true depth (%): 0 → 0.0, 25 → 24.0, 50 → 50.2; " in text
    assert "; the largest difference is 3.0 points." in text
    assert ["0 %", "25 %\n(at 24.0)", "50 %", "100 %"] in labels


def test_a_folder_without_true_depths_says_nothing_of_them() -> None:
    data = summary.summarise(CONFIG, rows({0: [UNKNOWN], 0.5: [UNKNOWN]}))
    assert depths.note(data["cells"]) is None
    assert not any("true depth" in note for note in report.notes(data))
    assert all("true_depth" not in cell for cell in data["cells"])
    assert pictures.needle_grid(data, "dense")[2] == [0, 0.5]
