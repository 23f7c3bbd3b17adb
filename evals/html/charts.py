"""Plots of a report as inline SVG, whose colours follow the page's light or dark theme.

matplotlib draws with colours that stand for a role (text, grid, series 1, ...). In the SVG each of them is
replaced by a CSS variable of the page. Text stays text, so that it can be selected, read aloud and scaled.
Every function returns the SVG, without a file or a request, and its description for those who cannot see it.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup, escape

from ..pictures import new_figure

INK, GRID, ACCENT, DIM, GROUND = "#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005"
_SERIES = [f"#0b00{number:02x}" for number in range(1, 9)]
_ROLES = {INK: "--ink", GRID: "--grid", ACCENT: "--accent", DIM: "--dim", GROUND: "--ground"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES, 1)
}
_SCALE = 1.7
"""CSS pixels of a point of a figure where there is room: text of 9 points is then 15 pixels high."""
_DASHES = ("-", "--", ":", "-.")
_MARKERS = "osD^vP*X"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": DIM,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "legend.frameon": False,
}


def pareto(points: Sequence[Mapping[str, Any]], what: str) -> Markup:
    """Quality against cost: numbered points with intervals, and a line through the methods that no other one
    beats in both. points: number, cost and kept (percent), low and high or None, chosen. what: where from."""
    with _drawn(5.2, 3.6) as (figure, done):
        axes = figure.add_subplot()
        axes.axhline(100, color=DIM, linewidth=1, linestyle=":")
        front = front_of(points)
        axes.plot(
            [p["cost"] for p in front], [p["kept"] for p in front], color=ACCENT, linewidth=1.2, zorder=2
        )
        for same in _together(points):
            point, chosen = same[0], any(p["chosen"] for p in same)
            colour = ACCENT if any(p in front for p in same) else DIM
            if point["low"] is not None:
                axes.plot([point["cost"]] * 2, [point["low"], point["high"]], color=colour, linewidth=1)
            face, ink = (ACCENT, GROUND) if chosen else (GROUND, INK)
            place = point["cost"], point["kept"]
            axes.plot(*place, "o", color=colour, markersize=13, markerfacecolor=face, zorder=3)
            numbers = ",".join(str(p["number"]) for p in same)
            size = 8 if len(numbers) < 3 else 6
            axes.text(*place, numbers, ha="center", va="center_baseline", fontsize=size, color=ink, zorder=4)
        axes.set_xlabel("keys read, mean of prefill and decode (% of dense)")
        axes.set_ylabel("score (% of dense)")
        axes.set_xlim(left=0)
    said = "; ".join(
        f"{p['number']} keeps {p['kept']:.0f} % at {p['cost']:.0f} % of the keys" for p in points
    )
    return done(f"Score against keys read, {what}. {said}. The table below names the numbers.")


def _together(points: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The points in groups that would be drawn at the same place."""
    places: dict[tuple[float, float], list[Mapping[str, Any]]] = {}
    for point in points:
        places.setdefault((round(point["cost"]), round(point["kept"])), []).append(point)
    return list(places.values())


def front_of(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The points that no other one beats in cost and in quality at once, by cost."""
    front: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["cost"], -p["kept"])):
        if not front or point["kept"] > front[-1]["kept"]:
            front.append(point)
    return front


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    what: str,
    *,
    log: bool = False,
    level: float | None = None,
) -> Markup:
    """A line for each name over its (x, y) points. log: both axes. level: a value of y to mark."""
    from matplotlib.ticker import LogLocator

    with _drawn(5.2, 3.1 + 0.17 * len(series)) as (figure, done):
        axes = figure.add_subplot()
        if level is not None:
            axes.axhline(level, color=DIM, linewidth=1, linestyle=":")
        for number, (name, points) in enumerate(series.items()):
            axes.plot(
                *zip(*points, strict=True),
                color=_SERIES[number % len(_SERIES)],
                marker=_MARKERS[number % len(_MARKERS)] if len(points) < 12 else None,
                linestyle=_DASHES[number // len(_SERIES) % len(_DASHES)],
                markersize=5,
                linewidth=1.5,
                label=name,
            )
        if log:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            sizes = sorted({px for points in series.values() for px, _ in points})
            axes.set_xticks(sizes, [_count(size) for size in sizes])
            axes.minorticks_off()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.legend(loc="outside lower left", fontsize=8)
    return done(f"{y} against {x}, {what}: {', '.join(series)}. The table below has the values.")


def intervals(rows: Sequence[tuple[str, float, float | None, float | None]], x: str, what: str) -> Markup:
    """A line per (name, value, low, high): the value and its interval beside a line at 0."""
    with _drawn(5.2, 0.75 + 0.27 * len(rows)) as (figure, done):
        axes = figure.add_subplot()
        axes.axvline(0, color=DIM, linewidth=1)
        for number, (_, value, low, high) in enumerate(rows):
            if low is not None and high is not None:
                axes.plot([low, high], [number] * 2, color=ACCENT, linewidth=2, solid_capstyle="butt")
            axes.plot(
                value,
                number,
                "o",
                color=ACCENT,
                markerfacecolor=ACCENT if low is not None else GROUND,
                markersize=5,
            )
        axes.set_yticks(range(len(rows)), [shortened(name, 34) for name, *_ in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(x)
    return done(f"{x}, {what}. The table below has the values.")


def heatmap(
    grid: Sequence[Sequence[float]], lengths: Sequence[str], depths: Sequence[str], what: str
) -> Markup:
    """Scores by depth (rows, the start of the text on top) and length (columns), red to green, each with its
    number. NaN where nothing was measured."""
    from matplotlib import colormaps

    with _drawn(1.5 + 0.62 * len(lengths), 0.95 + 0.3 * len(depths)) as (figure, done):
        axes = figure.add_subplot()
        axes.grid(visible=False)
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if math.isnan(value):
                    axes.text(x + 0.5, y + 0.5, "–", ha="center", va="center")
                    continue
                red, green, blue, _ = colormaps["RdYlGn"](0.12 + 0.76 * value)
                axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=(red, green, blue), linewidth=0)
                axes.text(x + 0.5, y + 0.5, f"{100 * value:.0f}", ha="center", va="center", color="#111111")
        axes.set_xlim(0, len(lengths))
        axes.set_ylim(len(depths), 0)
        axes.set_xticks([x + 0.5 for x in range(len(lengths))], lengths)
        axes.set_yticks([y + 0.5 for y in range(len(depths))], depths)
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel("depth")
    return done(f"Needle scores in percent by depth and length, {what}. The table below has the values.")


def shortened(text: str, most: int) -> str:
    """The text, or its start and an ellipsis."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _count(size: float) -> str:
    return f"{size / 1024:g}K" if size % 1024 == 0 else f"{size:g}"


@contextmanager
def _drawn(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of this size in inches, and the function that makes the SVG of it, given its description."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure = new_figure(width, height)

        def done(description: str) -> Markup:
            out = io.StringIO()
            with matplotlib.rc_context(_STYLE | {"svg.hashsalt": "farspan"}):
                figure.savefig(out, format="svg", metadata={"Date": None})
            return _cleaned(out.getvalue(), description)

        yield figure, done


def _cleaned(svg: str, description: str) -> Markup:
    """The `<svg>` element alone: roles in place of colours, ids that no other plot of the page has, no
    metadata. matplotlib has escaped the texts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    own = "p" + hashlib.sha256((svg + description).encode()).hexdigest()[:8]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}", svg)
    svg = re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", svg)
    for colour, role in _ROLES.items():
        svg = svg.replace(colour, f"var({role})")
    head = re.compile(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', re.DOTALL)
    found = head.search(svg)
    assert found is not None
    width = float(found[1].split()[2]) * _SCALE
    start = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{found[1]}" '
        f'style="max-width:{width:.0f}px" role="img" aria-label="{escape(description)}">'
    )
    svg = start + svg[found.end() :]
    return Markup(re.sub(r"\n\s*", "\n", svg).strip())
