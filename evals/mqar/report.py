"""The table of MQAR on the terminal and as Markdown, and the plot of accuracy against sizes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...runtime.table import Table
from ..pictures import new_figure
from ..results import Results, unfinished_note
from ..tables import markdown, percent
from .layers import SAME
from .settings import NAMES, Setting, parse_setting
from .train import DIVERGED

PUBLISHED: dict[str, Any] = {
    "samples": 100_000,
    "epochs": 64,
    "test_samples": 3000,
    "dropout": 0.1,
    "rates": [1e-4, 1e-4 * 100 ** (1 / 3), 1e-4 * 100 ** (2 / 3), 1e-2],
}
"""What the tables of 2312.04927 (figure 2) and 2402.18668 were made with."""
SIZES = {"state": "bytes of state", "parameters": "parameters"}
"""What accuracy is drawn against: keys of a cell, and the labels of the axes."""
_MARKERS = "os^Dv"
TRAINED = ("first", "samples", "epochs", "test_samples", "dropout", "stop")


def summarise(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """summary.json: a cell for each mixer, dim and setting with rows. Of each seed the learning rate with the
    highest accuracy counts; ``accuracy`` is the mean over seeds, ``low`` and ``high`` its range."""
    found: dict[tuple[str, int, Setting], dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        for setting in map(parse_setting, row["settings"]):
            cell = row["method"], row["dim"], setting
            found.setdefault(cell, {}).setdefault(row["seed"], []).append(row)
    cells = []
    for (mixer, dim, setting), seeds in found.items():
        name = str(setting)
        best = [max(runs, key=lambda row: row["accuracy"][name]) for runs in seeds.values()]
        accuracies = [row["accuracy"][name] for row in best]
        cells.append(
            {
                "mixer": mixer,
                "dim": dim,
                "setting": name,
                "length": setting.length,
                "accuracy": statistics.mean(accuracies),
                "low": min(accuracies),
                "high": max(accuracies),
                "seeds": len(best),
                "rates": sorted({row["lr"] for row in best}),
                "state": best[0]["state"][name],
                "parameters": best[0]["parameters"],
            }
        )
    costs = [
        {
            "mixer": mixer,
            "dim": dim,
            "runs": len(runs),
            "diverged": sum(row["ended"] == DIVERGED for row in runs),
            "cpu_seconds": sum(row["cpu_seconds"] for row in runs),
        }
        for mixer, dim in dict.fromkeys((row["method"], row["dim"]) for row in rows)
        for runs in [[row for row in rows if (row["method"], row["dim"]) == (mixer, dim)]]
    ]
    names = ("suite", "apart", "all_rates", "rates", "seeds", *TRAINED)
    return {
        **{name: config[name] for name in names},
        "reduced": reduced(config) if config["suite"] == "mqar" else [],
        "settings": sorted(config["tasks"], key=parse_setting),
        "cells": cells,
        "costs": costs,
        "rows": len(rows),
    }


def reduced(config: Mapping[str, Any]) -> list[str]:
    """What is smaller than in MQAR's paper, each with both numbers; empty if nothing is."""
    said = []
    for name in ("samples", "epochs", "test_samples"):
        if config[name] < PUBLISHED[name]:
            what = {"samples": "sequences an epoch", "test_samples": "test sequences"}.get(name, name)
            said.append(f"{config[name]:,} {what} (published {PUBLISHED[name]:,})")
    rates = config["rates"]
    if len(rates) < len(PUBLISHED["rates"]):
        said.append(f"{len(rates)} learning rates (published {len(PUBLISHED['rates'])})")
    if not config["all_rates"] and len(rates) > 1:
        said.append("no further learning rate once one has solved every setting")
    return said


def terminal_table(data: Mapping[str, Any]) -> Table:
    """A row for each mixer and dim: the accuracy of each setting, and the state at the longest one."""
    title = f"{data['suite']} · accuracy in percent" + (" · reduced" if data["reduced"] else "")
    table = Table(*columns(data), title=title, caption=" ".join(notes(data)), numbers_from=1)
    for row in table_rows(data):
        table.add_row(*row)
    return table


def columns(data: Mapping[str, Any]) -> list[str]:
    return ["mixer", "dim", *data["settings"], "state/layer", "parameters", "CPU min"]


def table_rows(data: Mapping[str, Any]) -> list[list[str]]:
    out = []
    for cost in data["costs"]:
        its = cost["mixer"], cost["dim"]
        cells = {c["setting"]: c for c in data["cells"] if (c["mixer"], c["dim"]) == its}
        shown = [_accuracy(cells.get(setting)) for setting in data["settings"]]
        longest = max(cells.values(), key=lambda cell: cell["length"])
        minutes = f"{cost['cpu_seconds'] / 60:.1f}"
        parameters = longest.get("parameters")  # summaries of earlier versions have none
        sizes = _state(longest), "–" if parameters is None else f"{parameters:,}"
        out.append([cost["mixer"], str(cost["dim"]), *shown, *sizes, minutes])
    return out


def _accuracy(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    if cell["seeds"] == 1:
        return percent(cell["accuracy"], 1)
    return f"{percent(cell['accuracy'], 1)} ({percent(cell['low'], 0)}–{percent(cell['high'], 0)})"


def _state(cell: Mapping[str, Any]) -> str:
    """The bytes that each layer keeps, once where they are equal."""
    return "+".join(f"{size:,}" for size in dict.fromkeys(cell["state"]))


def notes(data: Mapping[str, Any]) -> list[str]:
    """Sentences that explain the numbers."""
    seeds = len(data["seeds"])
    columns = "LENGTHxPAIRS" if data["suite"] == "mqar" else "SHORTEST-LONGESTxDEPTHxARGUMENTS"
    out = [f"reduced: {'; '.join(data['reduced'])}."] if data["reduced"] else []
    out += [
        "Accuracy: share of queries answered right, of the best learning rate"
        + (f", mean over {seeds} seeds with the lowest and highest." if seeds > 1 else ", one seed."),
        f"A run ends at {100 * data['stop']:.0f} %. Columns are {columns}. state/layer: bytes kept of a "
        "sequence of the longest setting, by each layer where they differ.",
    ]
    if data["first"] != SAME:
        out.append(f"The first layer is {data['first']} where a mixer is not A+B.")
    out.append(
        "A model for each setting." if data["apart"] else "One model is trained on all settings together."
    )
    if diverged := sum(cost["diverged"] for cost in data["costs"]):
        out.append(f"{diverged} runs ended in a loss that is not finite.")
    return out + unfinished_note(data)


def write(results: Results, data: Mapping[str, Any]) -> list[str]:
    """Write SUITE.md and SUITE.png beside the rows; returns the names written."""
    if not data["cells"]:
        return []
    rows = [[f"`{mixer}`", *rest] for mixer, *rest in table_rows(data)]
    text = "\n".join(
        [
            f"# {NAMES[data['suite']]}: accuracy in percent"
            + (" (reduced)" if data["reduced"] else "")
            + "\n",
            markdown(columns(data), rows),
            *(note + "\n" for note in notes(data)),
            f"![accuracy against state size and parameters]({data['suite']}.png)\n",
        ]
    )
    names = [f"{data['suite']}.md", f"{data['suite']}.png"]
    results.write_text(names[0], text)
    with results.picture(names[1]) as path:
        plot(data, path)
    return names


def plot(data: Mapping[str, Any], path: Any) -> None:
    """Accuracy against the bytes of state of both layers, and against the parameters of the model, a panel
    for each setting; points of one mixer at several dims are joined."""
    settings = data["settings"]
    width = max(6.0, 1.6 + 3.0 * len(settings))
    figure = new_figure(width, 7.0)
    panels = figure.subplots(2, len(settings), sharey=True, squeeze=False)
    mixers = list(dict.fromkeys(cell["mixer"] for cell in data["cells"]))
    looks = [{"color": f"C{i % 10}", "marker": _MARKERS[i // 10 % len(_MARKERS)]} for i in range(len(mixers))]
    for row, (size, label) in enumerate(SIZES.items()):
        for panel, setting in zip(panels[row], settings, strict=True):
            for mixer, look in zip(mixers, looks, strict=True):
                cells = [c for c in data["cells"] if (c["mixer"], c["setting"]) == (mixer, setting)]
                points = sorted((_total(c[size]), 100 * c["accuracy"]) for c in cells)
                if points:
                    panel.plot(*zip(*points, strict=True), **look)
            panel.set_xscale("log", base=2)
            panel.set_ylim(-3, 103)
            panel.set_title(parse_setting(setting).title, fontsize=9)
            panel.set_xlabel(label)
            panel.grid(alpha=0.3)
        panels[row][0].set_ylabel("accuracy (%)")
    handles = [
        panels[0][0].plot([], [], label=mixer, **look)[0] for mixer, look in zip(mixers, looks, strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(int(width // 2.6), len(mixers)), fontsize=8
    )
    figure.savefig(path, dpi=150)


def _total(size: int | list[int]) -> int:
    return size if isinstance(size, int) else sum(size)
