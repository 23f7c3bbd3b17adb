"""Pictures of an evaluation: the needle heatmap (depth × length) and RULER's scores (method × task)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .report import _k, slug
from .results import Results


def needle_grid(data: Mapping[str, Any], method: str) -> tuple[list[list[float]], list[int], list[float]]:
    """Mean scores as (grid [depths][lengths], lengths, depths), both ascending; NaN where there is no sample.

    Row 0 is the smallest depth: the needle at the start of the text.
    """
    cells = {(c["depth"], c["length"]): c["score"] for c in data["cells"] if c["method"] == method}
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    grid = [[float("nan") if (s := cells.get((d, n))) is None else s for n in lengths] for d in depths]
    return grid, lengths, depths


def write(results: Results, data: Mapping[str, Any]) -> list[str]:
    """One heatmap PNG per method for needle, one table PNG for RULER; returns their names."""
    names = []
    if data["suite"] == "needle":
        for number, row in enumerate(data["methods"]):
            names.append(f"heatmap_{slug(row['method'], number)}.png")
            with results.picture(names[-1]) as path:
                heatmap(data, row["method"], path)
    elif data["suite"] == "ruler":
        names.append("ruler.png")
        with results.picture(names[-1]) as path:
            score_grid(data, path)
    return names


def heatmap(data: Mapping[str, Any], method: str, path: Any) -> None:
    """Needle scores: length on x, depth on y with 0 % on top, red (lost) to green (found)."""
    grid, lengths, depths = needle_grid(data, method)
    figure = _figure(2.6 + 0.75 * len(lengths), 1.8 + 0.42 * len(depths))
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", origin="upper")
    axes.set_xticks(range(len(lengths)), [_k(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth")
    total = next(row for row in data["methods"] if row["method"] == method)
    axes.set_title(f"{method}\nmean {100 * (total['score'] or 0):.1f} %, n = {total['n']}", fontsize=9)
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=axes, label="score")
    figure.savefig(path, format="png", dpi=130)


def score_grid(data: Mapping[str, Any], path: Any) -> None:
    """RULER scores: one panel per length, methods down, tasks across with their mean last, red to green."""
    methods, tasks, lengths = [row["method"] for row in data["methods"]], data["tasks"], data["lengths"]
    scores = {(c["method"], c["task"], c["length"]): c["score"] for c in data["cells"]}
    means = {(row["method"], "mean", row["length"]): row.get("score") for row in data["overall"]}
    columns = [*tasks, "mean"]
    height = len(lengths) * (1.6 + 0.3 * len(methods))
    figure = _figure(4.5 + 0.7 * len(columns), height + 0.6)
    panels = figure.subplots(len(lengths), 1, squeeze=False)[:, 0]
    for axes, length in zip(panels, lengths, strict=True):
        found = [[(scores | means).get((method, task, length)) for task in columns] for method in methods]
        grid = [[float("nan") if value is None else value for value in row] for row in found]
        axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", origin="upper")
        axes.set_xticks(
            range(len(columns)), [name.removeprefix("niah_") for name in columns], rotation=30, ha="right"
        )
        axes.set_yticks(range(len(methods)), methods)
        axes.tick_params(labelsize=8)
        axes.set_title(f"{data['model']}, {_k(length)} tokens", fontsize=9)
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if value == value:
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    figure.savefig(path, format="png", dpi=130)


def _figure(width: float, height: float) -> Any:
    """A figure on the Agg canvas, made without pyplot: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
