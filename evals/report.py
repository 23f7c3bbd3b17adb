"""Rows to tables and pictures: per cell and overall, for the terminal, for Markdown and as PNG.

A cell is (method, task, length) and, for needle, a depth. Methods are compared with `dense` on the same
samples: `nll_diff` and `score_diff` are paired differences with their 95 % t interval (see stats.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .results import Results, unfinished_note
from .stats import paired, paired_interval, stratified_interval

BASELINE = "dense"
REACH = (0.2, 0.95)  # of dense's mean score on a task: below and above, all methods look alike
RULER_TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
)
"""The 11 tasks that need no dataset, as published."""
_NOISE, _WORDS = ("niah_single_1", "vt"), ("cwe", "fwe")
GROUPS = {
    "essay and needles": tuple(task for task in RULER_TASKS if task not in _NOISE + _WORDS),
    "noise": _NOISE,
    "word lists": _WORDS,
}
"""RULER's tasks by haystack. Noise is a sentence repeated, which flatters sparse methods: reported apart."""


def summarise(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What summary.json holds: `cells`, `overall` (per method and length), `in_reach` (the same over
    the tasks where dense scores within REACH) and `methods` (all lengths)."""
    methods = [m for m in config.get("methods", []) if any(row["method"] == m for row in rows)]
    lengths = sorted({row["length"] for row in rows})
    tasks = _ordered({row["task"] for row in rows})
    index: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        index.setdefault((row["method"], row["task"], row["length"]), []).append(row)
    cells, overall, totals, reach = [], [], [], []
    for method in methods:
        for length in lengths:
            for task in tasks:
                mine, base = index.get((method, task, length), []), index.get((BASELINE, task, length), [])
                for depth in sorted(
                    {row["extra"].get("depth") for row in mine}, key=lambda d: (d is not None, d)
                ):
                    here = [row for row in mine if row["extra"].get("depth") == depth]
                    cells.append(
                        {
                            "method": method,
                            "task": task,
                            "length": length,
                            "depth": depth,
                            **_cell(here, base),
                        }
                    )
            overall.append({"method": method, "length": length, **_overall(method, index, tasks, [length])})
            within = _in_reach(index, tasks, length)
            reach.append({"method": method, "length": length, **_overall(method, index, within, [length])})
        totals.append({"method": method, **_overall(method, index, tasks, lengths)})
    sessions = config.get("sessions", [])
    suite = config.get("suite") or (rows[0]["suite"] if rows else None)
    if suite == "ppl":
        for line in (*overall, *totals):
            line["perplexity"] = _exp(line.get("nll"))
    return {
        "suite": suite,
        "model": config.get("model"),
        "dtype": config.get("dtype"),
        "versions": config.get("versions"),
        "haystack": config.get("haystack") or config.get("text"),
        "lengths": lengths,
        "tasks": tasks,
        "rows": len(rows),
        "one_machine": len({tuple(map(s.get, ("cpu", "gpu", "threads", "ranks"))) for s in sessions}) <= 1,
        "cells": cells,
        "overall": overall,
        "in_reach": reach,
        "methods": totals,
    }


def _in_reach(
    index: Mapping[tuple[str, str, int], list[Mapping[str, Any]]], tasks: list[str], length: int
) -> list[str]:
    """The tasks that tell methods apart at this length: where dense scores within REACH."""
    low, high = REACH
    scores = {task: _mean(row["score"] for row in index.get((BASELINE, task, length), ())) for task in tasks}
    return [task for task, score in scores.items() if score is not None and low <= score <= high]


def _cell(rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    nll, score = _differences(rows, base, "nll"), _differences(rows, base, "score")
    return {
        "n": len(rows),
        **_costs(rows),
        "nll_diff": _dict(paired_interval(nll)),
        "score_diff": _dict(paired_interval(score)),
        "nll_invalid": sum(row["nll"] is None and row["gold_tokens"] > 0 for row in rows),
        "fallbacks": sorted({reason for row in rows for reason in row.get("fallbacks") or ()}),
    }


def _overall(
    method: str,
    index: Mapping[tuple[str, str, int], list[Mapping[str, Any]]],
    tasks: list[str],
    lengths: list[int],
) -> dict[str, Any]:
    """Means over the (task, length) cells, each cell counting the same however many samples it has."""
    groups = {(t, n): index[method, t, n] for t in tasks for n in lengths if (method, t, n) in index}
    costs = [_costs(rows) for rows in groups.values()]
    by_task = {
        task: _mean(_mean(r["score"] for r in rows) for (t, _), rows in groups.items() if t == task)
        for task in tasks
    }
    nll = [_differences(rows, index.get((BASELINE, *cell), []), "nll") for cell, rows in groups.items()]
    score = [_differences(rows, index.get((BASELINE, *cell), []), "score") for cell, rows in groups.items()]
    return {
        "n": sum(len(rows) for rows in groups.values()),
        "baseline_score": _mean(
            _mean(base["score"] for base in index.get((BASELINE, *cell), ()) if base["key"] in keys)
            for cell, keys in ((cell, {row["key"] for row in rows}) for cell, rows in groups.items())
        ),
        **({name: _mean(cost[name] for cost in costs) for name in costs[0]} if costs else {}),
        "tasks": by_task,
        "groups": {name: _mean(by_task.get(task) for task in members) for name, members in GROUPS.items()},
        "nll_diff": _dict(stratified_interval(nll)),
        "score_diff": _dict(stratified_interval(score)),
        "nll_invalid": sum(
            row["nll"] is None and row["gold_tokens"] > 0 for rows in groups.values() for row in rows
        ),
    }


def _costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {
        "score": _mean(row["score"] for row in rows),
        "nll": _mean(row["nll"] for row in rows),
        "prefill_density": _mean(row["density"]["prefill"] for row in rows),
        "decode_density": _mean(row["density"]["decode"] for row in rows),
        "kv_read": _mean(row["kv_read"] for row in rows),
        "prefill_seconds": _mean(row["seconds"]["prefill"] for row in rows),
        "decode_seconds": _mean(row["seconds"]["decode"] for row in rows),
        "step_ms": _mean(
            1e3 * row["seconds"]["decode"] * row["batch"] / max(row["steps"], 1) for row in rows
        ),
    }


# Tables


def ruler_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods; per length the score, the paired NLL difference, the share of keys read."""
    head = ["method"]
    for length in data["lengths"]:
        head += [f"{_k(length)} score", f"{_k(length)} ΔNLL (95 %)", f"{_k(length)} read"]
    body = []
    for method in _methods(data):
        cells = [f"`{method}`"]
        for length in data["lengths"]:
            row = _find(data["overall"], method=method, length=length)
            cells += (
                ["–"] * 3 if row is None else [_percent(row["score"], 1), difference(row), share_read(row)]
            )
        body.append(cells)
    return markdown(head, body)


def reach_table(data: Mapping[str, Any]) -> str:
    """Markdown, a row per method and length, over the tasks where dense scores within REACH: the score and
    dense's on the prompts that both have, and the paired differences."""
    head = ["method", "length", "tasks", "n", "score", "dense", "Δscore (95 %)", "ΔNLL (95 %)", "read"]
    body = [
        [
            f"`{row['method']}`",
            _k(row["length"]),
            str(sum(score is not None for score in row["tasks"].values())),
            str(row["n"]),
            _percent(row["score_diff"] and row["baseline_score"] + row["score_diff"]["mean"], 1),
            _percent(row["baseline_score"], 1),
            difference(row, "score_diff", 100, 1),
            difference(row),
            share_read(row),
        ]
        for row in data["in_reach"]
        if row["n"]
    ]
    return markdown(head, body)


def group_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods; mean score per group of tasks and length, the noise haystacks apart."""
    names = [name for name, members in GROUPS.items() if any(task in data["tasks"] for task in members)]
    head = ["method", *(f"{name}, {_k(length)}" for name in names for length in data["lengths"])]
    body = []
    for method in _methods(data):
        found = [_find(data["overall"], method=method, length=length) for length in data["lengths"]]
        body.append(
            [
                f"`{method}`",
                *(_percent(row["groups"][name] if row else None, 1) for name in names for row in found),
            ]
        )
    return markdown(head, body)


def task_table(data: Mapping[str, Any], length: int) -> str:
    """Markdown, rows = methods, columns = tasks at one length: `score (ΔNLL)`, `*` where 0 is excluded."""
    head = ["method", *data["tasks"], "mean"]
    body = []
    for method in _methods(data):
        cells = [f"`{method}`"]
        for task in data["tasks"]:
            cell = _find(data["cells"], method=method, task=task, length=length)
            cells.append(
                "–" if cell is None else f"{_percent(cell['score'], 0)}{_bracketed(method, cell['nll_diff'])}"
            )
        row = _find(data["overall"], method=method, length=length)
        body.append([*cells, _percent(row["score"] if row else None, 1)])
    return markdown(head, body)


def cost_table(data: Mapping[str, Any]) -> str:
    """Markdown, a row per method and length: shares read in prefill and decode, KV bytes, seconds."""
    head = [
        "method",
        "length",
        "n",
        "prefill keys",
        "decode keys",
        "KV bytes",
        "prefill s/sample",
        "ms/decode step",
    ]
    body = [
        [
            f"`{row['method']}`",
            _k(row["length"]),
            str(row["n"]),
            *(_percent(row[name], 1, " %") for name in ("prefill_density", "decode_density", "kv_read")),
            _number(row["prefill_seconds"], 2),
            _number(row["step_ms"], 1),
        ]
        for row in data["overall"]
        if row["n"]
    ]
    return markdown(head, body)


def needle_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods over all lengths and depths: score, ΔNLL, share read, seconds."""
    head = ["method", "n", "score", "ΔNLL (95 %)", "read", "prefill s/sample", "ms/decode step"]
    return markdown(head, [[f"`{row['method']}`", *_line(row)] for row in data["methods"]])


def perplexity_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods: perplexity, alone and divided by dense's on the same windows, the NLL
    difference behind that, keys read."""
    head = [
        "method",
        "windows",
        "perplexity",
        "÷ dense's",
        "ΔNLL (95 %)",
        "read",
        "prefill s/sample",
        "ms/decode step",
    ]
    body = []
    for row in data["methods"]:
        n, _, *rest = _line(row)
        found = row["nll_diff"]
        ratio = _number(_exp(found and found["mean"]), 4)
        body.append([f"`{row['method']}`", n, _number(row["perplexity"], 2), ratio, *rest])
    return markdown(head, body)


def terminal_table(data: Mapping[str, Any]) -> Any:
    """A rich Table that fits a terminal: one row per method and length."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{data['suite']} · {data['model']}",
        caption=" ".join(notes(data, short=True)),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", overflow="fold", min_width=12)
    quality = "perplexity" if data["suite"] == "ppl" else "score"
    for name in ("length", "n", quality, "ΔNLL ± 95 %", "read %", "prefill s", "ms/step"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in data["overall"]:
        if row["n"]:
            n, score, _, read, *seconds = _line(row)
            read = read.removesuffix(" %").replace(" ", "")
            score = _number(row["perplexity"], 2) if quality == "perplexity" else score
            table.add_row(row["method"], _k(row["length"]), n, score, _plus_minus(row), read, *seconds)
    return table


def notes(data: Mapping[str, Any], *, short: bool = False) -> list[str]:
    """What a reader must know beside the numbers."""
    out = ["read: share of keys read in prefill / decode."]
    if not short:
        out = [
            "Score: mean over tasks of the published metric, in percent (greedy answers). ΔNLL: negative "
            "log-likelihood of the gold answer per token (nats) under teacher forcing through the method's "
            "own decode path, minus dense on the same prompts, with the 95 % t interval over samples (within "
            "tasks). Read: share of the causal (query, key) pairs read in prefill / decode; KV bytes counts "
            "summaries too. Seconds are a sample's share of its batch."
        ]
        if data["suite"] == "ruler" and any(row["n"] for row in data["in_reach"]):
            out.append(
                "In reach: tasks chosen by dense's own score. Score and dense are over the same prompts, "
                "Δscore is paired like ΔNLL; an interval without width says that all differences were equal."
            )
        counts = sorted({cell["n"] for cell in data["cells"]})
        out.append(f"Samples a cell: {' to '.join(str(n) for n in dict.fromkeys(counts[:1] + counts[-1:]))}.")
        if data["suite"] == "ppl":
            out.append(
                "Perplexity: exp of the mean negative log-likelihood over the windows. A decode step here is "
                "a token of a call of up to 16; a token that is generated takes a call of its own."
            )
        if data["haystack"]:
            out.append(f"Text: {data['haystack']}.")
    if data["suite"] == "ruler" and set(data["tasks"]) != set(RULER_TASKS):
        out.append(f"{len(data['tasks'])} of RULER's 11 dataset-free tasks.")
    if not any(row["method"] == BASELINE for row in data["methods"]):
        out.append("Add the method dense to this folder to get paired differences.")
    out += unfinished_note(data)
    if not data["one_machine"]:
        out.append("Sessions ran on different machines, threads or ranks: seconds are not comparable.")
    invalid = sum(row["nll_invalid"] for row in data["methods"])
    if invalid:
        out.append(f"{invalid} likelihoods were not finite and are left out of ΔNLL.")
    return out


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the rest to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def difference(row: Mapping[str, Any], name: str = "nll_diff", scale: float = 1, digits: int = 3) -> str:
    """`+0.12 [+0.05, +0.19]`, or a dash for dense itself and where there is nothing to compare with."""
    found = row.get(name)
    if found is None or row["method"] == BASELINE:
        return "–"
    mean, low, high = (
        None if found[x] is None else f"{scale * found[x]:+.{digits}f}" for x in ("mean", "low", "high")
    )
    return str(mean) if low is None else f"{mean} [{low}, {high}]"


def _plus_minus(row: Mapping[str, Any]) -> str:
    found = row.get("nll_diff")
    if found is None or found["low"] is None or row["method"] == BASELINE:
        return difference(row)
    return f"{found['mean']:+.3f} ± {found['high'] - found['mean']:.3f}"


def share_read(row: Mapping[str, Any]) -> str:
    """Shares of keys read, `prefill / decode` in percent."""
    return f"{_percent(row['prefill_density'], 0)} / {_percent(row['decode_density'], 1)} %"


def write(results: Results, data: Mapping[str, Any]) -> list[str]:
    """Write the tables and pictures of a folder beside its rows; returns the names written."""
    from . import pictures

    if not data["rows"]:
        return []
    title = f"# {data['suite']}: {data['model']} ({data['dtype']})\n"
    if data["suite"] == "needle":
        parts = [title, needle_table(data)]
    elif data["suite"] == "ppl":
        parts = [title, perplexity_table(data)]
    else:
        parts = [title, ruler_table(data)]
        if any(row["n"] for row in data["in_reach"]):
            low, high = (f"{100 * x:.0f}" for x in REACH)
            parts.append(f"## Tasks in reach: dense scores {low} to {high}\n\n{reach_table(data)}")
        parts.append(f"## By haystack\n\n{group_table(data)}")
        parts += [f"## {_k(length)}\n\n{task_table(data, length)}" for length in data["lengths"]]
    text = "\n".join([*parts, cost_table(data), *(note + "\n" for note in notes(data))])
    name = f"{data['suite']}.md"
    results.write_text(name, text)
    return [name, *pictures.write(results, data)]


def slug(method: str, number: int) -> str:
    """A file name for a method: its spec without what file names cannot hold, kept apart by its number."""
    return f"{number:02d}_{re.sub(r'[^A-Za-z0-9]+', '-', method).strip('-')[:60]}"


def _line(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["n"]),
        _percent(row["score"], 1),
        difference(row),
        share_read(row),
        _number(row["prefill_seconds"], 2),
        _number(row["step_ms"], 1),
    ]


def _bracketed(method: str, interval: Mapping[str, Any] | None) -> str:
    if interval is None or method == BASELINE:
        return ""
    sure = interval["low"] is not None and (interval["low"] > 0 or interval["high"] < 0)
    return f" ({interval['mean']:+.2f}{'*' if sure else ''})"


def _differences(
    rows: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]], name: str
) -> list[float]:
    return list(paired({r["key"]: r[name] for r in rows}, {r["key"]: r[name] for r in base}).values())


def _ordered(tasks: Iterable[str]) -> list[str]:
    published = {task: i for i, task in enumerate(RULER_TASKS)}
    return sorted(tasks, key=lambda task: (published.get(task, len(published)), task))


def _methods(data: Mapping[str, Any]) -> list[str]:
    return [row["method"] for row in data["methods"]]


def _find(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    return next((row for row in rows if row.get("n") and all(row[k] == v for k, v in wanted.items())), None)


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return sum(kept) / len(kept) if kept else None


def _exp(nll: float | None) -> float | None:
    """The perplexity of a mean NLL; infinite beyond what a float holds."""
    try:
        return None if nll is None else math.exp(nll)
    except OverflowError:
        return math.inf


def _dict(interval: Any) -> dict[str, Any] | None:
    return None if interval is None else interval.to_dict()


def _percent(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}{unit}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _k(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
