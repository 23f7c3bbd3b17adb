"""The picture of a simulated scaling: seconds of a layer and efficiency over the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...attention.errors import FarspanError


def scaling_picture(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Rows of :func:`~farspan.parallel.planner.simulate.scaling` as a PNG: strong scaling left, weak right.
    Raises FarspanError where matplotlib is not installed."""
    try:  # without pyplot: no display, no global state
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise FarspanError(
            "A picture needs matplotlib; install it (pip install 'farspan[evals]') or leave out --out."
        ) from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    figure.suptitle(title)
    for column, kind in enumerate(("strong", "weak")):
        mine = [row for row in rows if row["kind"] == kind]
        seconds, efficiency = panels[0][column], panels[1][column]
        counts = sorted({row["ranks"] for row in mine})
        ideal = {row["ranks"]: row["one_rank_seconds"] / row["ranks"] for row in mine}
        seconds.plot(counts, [ideal[n] for n in counts], "--", color="grey", label="ideal")
        for name in dict.fromkeys(row["mechanism"] for row in mine):
            line = [row for row in mine if row["mechanism"] == name]
            places = [row["ranks"] for row in line]
            seconds.plot(places, [row["seconds"] for row in line], marker="o", markersize=3, label=name)
            efficiency.plot(places, [100 * row["efficiency"] for row in line], marker="o", markersize=3)
        tokens = {row["tokens"] // (row["ranks"] if kind == "weak" else 1) for row in mine}
        each = " a rank" if kind == "weak" else ""
        seconds.set_title(f"{kind} scaling: {', '.join(map(str, sorted(tokens)))} tokens{each}", fontsize=10)
        seconds.set_xscale("log", base=2)
        seconds.set_yscale("log")
        seconds.set_ylabel("seconds of a layer")
        seconds.legend(fontsize=8)
        efficiency.axhline(100, linestyle="--", color="grey")
        efficiency.set_ylim(0, 105)
        efficiency.set_ylabel("efficiency (%)")
        efficiency.set_xlabel("ranks")
        efficiency.set_xticks(counts, [str(n) for n in counts], rotation=45, fontsize=8)
        for axes in (seconds, efficiency):
            axes.grid(True, linewidth=0.3)
    figure.savefig(path, format="png", dpi=130)
