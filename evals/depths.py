"""The true depths of needles beside the requested ones, for summary.json, the Markdown and the heatmaps.

A needle stands between two pieces of the haystack (see pieces.py), so its true depth is near the requested
one, not equal to it. Rows of earlier versions have no `true_depth`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """A cell's mean "true_depth", and "depth_error": the largest distance from the requested depth.

    Empty where no row of the cell has a true depth.
    """
    known = [row["extra"] for row in rows if row["extra"].get("true_depth") is not None]
    if not known:
        return {}
    return {
        "true_depth": sum(extra["true_depth"] for extra in known) / len(known),
        "depth_error": max(abs(extra["true_depth"] - extra["depth"]) for extra in known),
    }


def by_depth(cells: Iterable[Mapping[str, Any]]) -> dict[float, float]:
    """Requested depth -> mean true depth over the cells that have one, ascending."""
    found: dict[float, list[float]] = {}
    for cell in cells:
        if "true_depth" in cell:
            found.setdefault(cell["depth"], []).append(cell["true_depth"])
    return {depth: sum(found[depth]) / len(found[depth]) for depth in sorted(found)}


def note(cells: Iterable[Mapping[str, Any]]) -> str | None:
    """A sentence on requested and true depths, in percent; None where no cell has true ones."""
    cells = [cell for cell in cells if "true_depth" in cell]
    if not cells:
        return None
    pairs = ", ".join(f"{100 * asked:g} → {100 * true:.1f}" for asked, true in by_depth(cells).items())
    worst = 100 * max(cell["depth_error"] for cell in cells)
    return f"Depth asked → mean true depth (%): {pairs}; the largest difference is {worst:.1f} points."


def label(depth: float, true: float | None) -> str:
    """A heatmap's label for a depth: "25 %", with the mean true depth where it differs by half a point."""
    asked = f"{100 * depth:.0f} %"
    return asked if true is None or abs(true - depth) < 0.005 else f"{asked}\n(at {100 * true:.1f})"
