"""The printed tables at every width: every number and every name of a method is there, whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from farspan.evals import pictures, report, speed_tables
from farspan.runtime.table import Table

NAMES = [
    "dense",
    "double_sparsity:k=512",
    "recycled:k=512,stride=10,pool=15",
    "antidiagonal:block=64,stride=8 + double_sparsity:k=1024,group_factor=2",
]
WIDTHS = range(40, 201)


def whole(table: Table, numbers: list[str], names: list[str] = NAMES) -> None:
    """Every number stands by itself in the text, and between the parts of a name are line breaks at most."""
    for width in WIDTHS:
        text = table.text(width)
        assert max(map(len, text.splitlines())) <= width
        for number in numbers:
            assert re.search(rf"(?<!\S){re.escape(number)}(?!\S)", text), (width, number)
        for name in names:
            spelt = r"\s*".join(map(re.escape, re.findall(r"[^,: ]+[,:]?", name)))
            assert re.search(rf"(?<!\S){spelt}(?!\S)", text), (width, name)


def interval(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 123456, "reason": None}


def evaluated() -> dict[str, Any]:
    overall = [
        {
            "method": name,
            "length": 1048576 + i,
            "n": 123456 + i,
            "score": 1.0,
            "nll_diff": interval(-12345.678 - i, 98765.432),
            "prefill_density": 1.0,
            "decode_density": 0.9876 + i / 1000,
            "prefill_seconds": 12345.67 + i,
            "step_ms": 99999.9 - i,
            "nll_invalid": 0,
        }
        for i, name in enumerate(NAMES)
    ]
    common = {"suite": "needle", "model": "some-model", "tasks": ["needle"], "one_machine": True}
    return {**common, "overall": overall, "methods": overall, "in_reach": [], "cells": [], "haystack": "sotu"}


def test_an_evaluation() -> None:
    numbers = ["100.0", "1M", "1048577", "100/98.8", "100/98.9", "100/99.0", "100/99.1"]
    for i in range(4):
        numbers += [str(123456 + i), f"{12345.67 + i:.2f}", f"{99999.9 - i:.1f}"]
    numbers += [f"{-12345.678 - i:+.3f} ± 98765.432" for i in range(1, 4)]
    whole(report.terminal_table(evaluated()), numbers)


@pytest.mark.parametrize("ranks", [1, 16])
def test_speeds(ranks: int) -> None:
    overall = [
        {
            "method": name,
            "length": 1048576,
            "prefill_seconds": 12345.67 + i,
            "prefill_speedup": 1234.5 + i,
            "decode_tokens_per_second": 23456.7 + i,
            "decode_speedup": 345.67 + i,
            "prefill_density": 1.0,
            "decode_density": 0.1234,
            "score": 1.0,
            "peak_memory_bytes": 123_000_000_000 + i * 10**9,
            "prefill_sent_bytes": 456_000_000,
            "decode_sent_bytes_per_token": 78_900,
        }
        for i, name in enumerate(NAMES)
    ]
    data = {"model": "some-model", "baseline": "dense", "ranks": ranks, "sessions": 1}
    data |= {"overall": overall}
    numbers = ["1048576", "100 / 12.3", "100 %", *(["456 MB / 78.9 kB"] if ranks > 1 else [])]
    for i in range(4):
        numbers += [
            f"{12345.67 + i:.2f}",
            f"{1234.5 + i:.2f}",
            f"{23456.7 + i:.1f}",
            f"{345.67 + i:.2f}",
            f"{123 + i} GB",
        ]
    whole(speed_tables.terminal_table(data), numbers)


def test_a_heatmap_has_its_method_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    real = pictures.new_figure
    monkeypatch.setattr(pictures, "new_figure", lambda *size: figures.append(real(*size)) or figures[-1])
    cell = {"method": NAMES[3], "task": "needle", "length": 1024, "score": 1.0, "n": 1}
    cells = [cell | {"depth": depth} for depth in (0.0, 1.0)]
    data = {"cells": cells, "methods": [{"method": NAMES[3], "score": 1.0, "tasks": {"needle": 1.0}, "n": 2}]}
    pictures.heatmap(data, NAMES[3], tmp_path / "heat.png")
    title = figures[0].axes[0].title
    assert NAMES[3] in title.get_text().replace(",\n", ",").replace(":\n", ":").replace("\n", " ")
    left, right = title.get_window_extent().intervalx
    assert left >= 0 and right <= figures[0].bbox.width
