"""Pictures: the needle heatmap (depth × length), RULER's scores (method × task), and what a prefill read of
the true attention (blocks of queries × blocks of keys)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from ..attention.errors import FarspanError
from ..runtime.inspect import LayerPicture
from ..runtime.table import wrap
from .depths import by_depth, label
from .results import Results
from .tables import short_length


def needle_grid(
    data: Mapping[str, Any], method: str, task: str = "needle"
) -> tuple[list[list[float]], list[int], list[float]]:
    """Mean scores as (grid [depths][lengths], lengths, depths), both ascending; NaN where there is no sample.

    Row 0 is the smallest depth: the needle at the start of the text.
    """
    found = [c for c in data["cells"] if (c["method"], c["task"]) == (method, task)]
    cells = {(c["depth"], c["length"]): c["score"] for c in found}
    depths = sorted({depth for depth, _ in cells})
    lengths = sorted({length for _, length in cells})
    grid = [[float("nan") if (s := cells.get((d, n))) is None else s for n in lengths] for d in depths]
    return grid, lengths, depths


def write(results: Results, data: Mapping[str, Any]) -> list[str]:
    """One heatmap PNG per method and task for needle, one table PNG for RULER; returns their names."""
    names = []
    if data["suite"] == "needle":
        for number, row in enumerate(data["methods"]):
            for task in data["tasks"]:
                kind = "" if task == "needle" else f"{task}_"
                names.append(f"heatmap_{kind}{slug(row['method'], number)}.png")
                with results.picture(names[-1]) as path:
                    heatmap(data, row["method"], path, task=task)
    elif data["suite"] == "ruler":
        names.append("ruler.png")
        with results.picture(names[-1]) as path:
            score_grid(data, path)
    return names


def heatmap(data: Mapping[str, Any], method: str, path: Any, *, task: str = "needle") -> None:
    """Needle scores: length on x, depth on y with 0 % on top, red (lost) to green (found).

    Below a depth stands the mean true depth of its needles, where that differs by half a point or more.
    """
    grid, lengths, depths = needle_grid(data, method, task)
    width = 2.6 + 0.75 * len(lengths)
    figure = new_figure(width, 1.8 + 0.42 * len(depths))
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto", origin="upper")
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    shown = [cell for cell in data["cells"] if (cell["method"], cell["task"]) == (method, task)]
    true = by_depth(shown)
    axes.set_yticks(range(len(depths)), [label(depth, true.get(depth)) for depth in depths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth")
    total = next(row for row in data["methods"] if row["method"] == method)
    mean, n = total["tasks"].get(task) or 0, sum(cell["n"] for cell in shown)
    name = "\n".join(wrap(method, int(11 * width)))  # characters of this size in an inch
    axes.set_title(f"{name}\nmean {100 * mean:.1f} %, n = {n}", fontsize=9)
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
    figure = new_figure(4.5 + 0.7 * len(columns), height + 0.6)
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
        axes.set_title(f"{data['model']}, {short_length(length)} tokens", fontsize=9)
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if value == value:
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    figure.savefig(path, format="png", dpi=130)


READ, MISSED, HIDDEN = "Blues", "Reds", "#e9e9e9"  # colour maps, and the colour of keys later than the query
FAINTEST = 1e-4  # attention at the pale end of the maps; 1 is at the other


def what_was_read(picture: LayerPicture, method: str, path: Any) -> None:
    """Draw one panel per head, and a legend: each block's largest true attention, blue if the block was read,
    red if it was missed. A deeper colour is more attention."""
    side, left, right, gap, top, bottom = 2.9, 0.7, 0.25, 0.65, 0.85, 1.45  # inches
    count = len(picture.heads)
    wide = min(count, 3)
    tall = -(-count // wide)
    width = max(left + wide * (side + gap) - gap + right, 6.5)
    height = top + tall * (side + gap + 0.1) - gap - 0.1 + bottom
    figure = new_figure(width, height)
    figure.set_layout_engine("none")

    def place(x: float, y: float, across: float, up: float) -> Any:
        return figure.add_axes((x / width, y / height, across / width, up / height))

    figure.text(left / width, 1 - 0.3 / height, f"{method}, layer {picture.layer}", fontsize=11)
    n, size = picture.attention.shape[1], picture.block
    for panel, head in enumerate(picture.heads):
        row, column = divmod(panel, wide)
        up = height - top - side - row * (side + gap + 0.1)
        axes = place(left + column * (side + gap), up, side, side)
        axes.imshow(
            _coloured(picture.attention[panel], picture.read[panel]),
            extent=(0, n * size, n * size, 0),
            interpolation="nearest" if n <= 300 else "antialiased",  # blocks smaller than dots are averaged
        )
        axes.set_xlim(0, picture.length)
        axes.set_ylim(picture.length, 0)
        axes.set_title(
            f"head {head}: {100 * picture.density[panel]:.1f} % of pairs, "
            f"{100 * picture.recall[panel]:.1f} % of mass",
            fontsize=9,
        )
        axes.tick_params(labelsize=7)
        axes.locator_params(nbins=5)
        if row == (count - 1 - column) // wide:
            axes.set_xlabel("key (position)", fontsize=8)
        if column == 0:
            axes.set_ylabel("query (position)", fontsize=8)
    bar = (width - left - right - 2 * 0.4) / 3
    _legend([place(left + i * (bar + 0.4), 0.5, bar, 0.18) for i in range(3)])
    label = "the largest true attention probability in a block of queries and keys"
    figure.text((left + width - right) / 2 / width, 0.13 / height, label, ha="center", fontsize=8)
    figure.savefig(path, format="png", dpi=130)


def _coloured(attention: Any, read: Any) -> Any:
    """Blocks [N, N] as colours [N, N, 3], above the diagonal those of what no query may see."""
    import numpy as np

    colours = _mixed(attention.numpy(), read.numpy())
    hidden = np.triu(np.ones(attention.shape, dtype=bool), 1)
    colours[hidden] = [int(HIDDEN[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return colours


def _mixed(attention: Any, share: Any) -> Any:
    """Arrays of attention and of the share read -> [..., 3]: the colours of both, mixed by that share."""
    import numpy as np
    from matplotlib import colormaps

    depth = 1 - np.log10(np.clip(attention, FAINTEST, 1)) / np.log10(FAINTEST)
    read = colormaps[READ](0.2 + 0.8 * depth)[..., :3]  # never white, however little attention it has
    missed = np.where(depth[..., None] > 0, colormaps[MISSED](depth)[..., :3], 1.0)
    return share[..., None] * read + (1 - share[..., None]) * missed


def _legend(bars: list[Any]) -> None:
    """Colour bars: the colour of each attention probability, for three shares read."""
    import numpy as np

    attention = np.logspace(-4, 0, 256)[None]
    for axes, name, share in zip(bars, ("read", "half of it read", "not read"), (1.0, 0.5, 0.0), strict=True):
        axes.imshow(_mixed(attention, np.full_like(attention, share)), extent=(-4, 0, 0, 1), aspect="auto")
        axes.set_yticks([])
        axes.set_xticks(range(-4, 1), ["≤ .0001", ".001", ".01", ".1", "1"], fontsize=7)
        axes.set_title(name, fontsize=8, pad=3)


def check_matplotlib() -> None:
    """Raises FarspanError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise FarspanError("A picture needs matplotlib: pip install 'farspan[evals]'.")


def new_figure(width: float, height: float) -> Any:
    """A figure on the Agg canvas, made without pyplot: no display, no global state."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def slug(method: str, number: int) -> str:
    """A file name for a method: its number, and its spec without characters that file names cannot have."""
    return f"{number:02d}_{re.sub(r'[^A-Za-z0-9]+', '-', method).strip('-')[:60]}"
