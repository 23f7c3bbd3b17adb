"""What was read in each layer, and how fast it was: plots and tables of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from ..folders import FROM_SCRATCH, SPEED, Evaluation
from ..speed_tables import wide
from ..tables import number, short_length
from .view import Figure, Grid

PHASES = ("prefill", "decode")
_SHOWN = 8
"""Methods of a plot: more lines cannot be told apart."""


def layer_densities(one: Evaluation) -> list[Figure]:
    """A plot for each phase: the share of keys that each layer reads, at the longest length.

    Rows of earlier versions have no layers. Methods that read the same share in every layer are left out.
    """
    from . import charts

    if one.suite in (SPEED, *FROM_SCRATCH):
        return []
    length = max(row["length"] for row in one.rows)
    rows = [row for row in one.rows if row["length"] == length and isinstance(row.get("layers"), dict)]
    out = []
    for phase in PHASES:
        by_method: dict[str, list[list[float]]] = {}
        for row in rows:
            shares = row["layers"].get(phase)
            if isinstance(shares, list) and all(isinstance(share, int | float) for share in shares):
                by_method.setdefault(row["method"], []).append(shares)
        series = {
            method: [(float(i), 100 * mean(layer)) for i, layer in enumerate(zip(*found, strict=False))]
            for method, found in list(by_method.items())[:_SHOWN]
        }
        if series:
            what = f"{one.model}, {one.suite}, {phase} at {short_length(length)} tokens"
            svg = charts.lines(series, "layer", "keys read (%)", what)
            grid = _by_layer(f"Keys read in percent by layer, {what}", series)
            out.append(Figure(svg, grid, grid.caption))
    return out


def inspected(inspections: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """A plot for each prompt that `farspan inspect` has looked at: density and attention mass by layer."""
    from . import charts

    out = []
    for data in inspections:
        rows = data["layers"]
        series = {
            "keys read": [(float(row["layer"]), 100 * row["density"]) for row in rows],
            "attention mass on them": [(float(row["layer"]), 100 * row["mass_recall"]) for row in rows],
        }
        what = f"{data['method']} on {data['model']}, a prompt of {data['prompt_tokens']} tokens"
        svg = charts.lines(series, "layer", "percent of dense", what)
        grid = _by_layer(f"Prefill by layer in percent, {what}", series)
        out.append(Figure(svg, grid, grid.caption))
    return out


def _by_layer(caption: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Grid:
    layers = sorted({x for points in series.values() for x, _ in points})
    values = {name: dict(points) for name, points in series.items()}
    rows: list[list[Any]] = [
        [f"{layer:.0f}", *(number(values[name].get(layer), 1) for name in series)] for layer in layers
    ]
    return Grid(caption, ["layer", *series], rows, code=False)


def speed_figures(one: Evaluation) -> list[Figure]:
    """Seconds to the first token and tokens per second by length, and the break-even of each method."""
    from . import charts

    data = one.data
    methods = list(dict.fromkeys(row["method"] for row in data["overall"]))[:_SHOWN]
    out = []
    for name, title in (
        ("prefill_seconds", "seconds to the first token"),
        ("decode_tokens_per_second", "tokens per second"),
    ):
        series = {
            method: [(row["length"], row[name]) for row in data["overall"] if row["method"] == method]
            for method in methods
        }
        rows: list[list[Any]] = [
            [method, *(number(dict(series[method]).get(n), 2) for n in _lengths(data))] for method in methods
        ]
        heads = ["method", *map(short_length, _lengths(data))]
        grid = Grid(f"{title[0].upper()}{title[1:]} by length, {one.model}", heads, rows)
        out.append(
            Figure(charts.lines(series, "prompt (tokens)", title, one.model, log=True), grid, grid.caption)
        )
    return out


def speed_table(one: Evaluation) -> Grid:
    """Every length and method: medians, ratios to the baseline, memory, spread, energy where it was told."""
    head, rows = wide(one.data)
    caption = (
        f"Speed of {one.model} ({one.config.get('dtype')}); × is the factor beside {one.data['baseline']}"
    )
    return Grid(caption, head, [list(row) for row in rows])


def break_even(one: Evaluation) -> Grid:
    """From which length each method is faster than the baseline, in prefill and in decode."""
    data = one.data
    methods = [m for m in dict.fromkeys(row["method"] for row in data["overall"]) if m != data["baseline"]]
    rows: list[list[Any]] = []
    for method in methods:
        ratios = [
            [(row["length"], row[name]) for row in data["overall"] if row["method"] == method and row[name]]
            for name in ("prefill_speedup", "decode_speedup")
        ]
        rows.append([method, *map(crossing, ratios)])
    return Grid(
        f"From which length a method is faster than {data['baseline']}; between two measured lengths it is "
        "interpolated",
        ["method", "first token", "decode"],
        rows,
    )


def crossing(ratios: Sequence[tuple[int, float]]) -> str:
    """The length from which the ratios stay above 1, in words. Between two lengths both logarithms are
    interpolated."""
    if not ratios:
        return "not measured"
    slow = [i for i, (_, ratio) in enumerate(ratios) if ratio <= 1]
    if not slow:
        return f"at every measured length, from {short_length(ratios[0][0])} on"
    if slow[-1] == len(ratios) - 1:
        return f"not up to {short_length(ratios[-1][0])}, the longest measured"
    (a, low), (b, high) = ratios[slow[-1]], ratios[slow[-1] + 1]
    step = -math.log(low) / (math.log(high) - math.log(low))
    where = math.exp(math.log(a) + step * (math.log(b) - math.log(a)))
    return f"about {where:,.0f} tokens (between {short_length(a)} and {short_length(b)})"


def _lengths(data: Mapping[str, Any]) -> list[int]:
    return sorted({row["length"] for row in data["overall"]})
