"""A summary as Markdown tables, and the format of their cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .summary import BASELINE, CATEGORIES, EFFECTIVE, GROUPS, exp


def ruler_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods; per length the score, the paired NLL difference, the share of keys read."""
    head = ["method"]
    for length in data["lengths"]:
        head += [
            f"{short_length(length)} score",
            f"{short_length(length)} ΔNLL (95 %)",
            f"{short_length(length)} read",
        ]
    body = []
    for method in _methods(data):
        cells = [f"`{method}`"]
        for length in data["lengths"]:
            row = _find(data["overall"], method=method, length=length)
            cells += (
                ["–"] * 3 if row is None else [percent(row["score"], 1), difference(row), share_read(row)]
            )
        body.append(cells)
    return markdown(head, body)


def reach_table(data: Mapping[str, Any]) -> str:
    """Markdown, a row per method and length, over the tasks on which dense scores within REACH: the score,
    that of dense on the same prompts, and the paired differences."""
    head = ["method", "length", "tasks", "n", "score", "dense", "Δscore (95 %)", "ΔNLL (95 %)", "read"]
    body = [
        [
            f"`{row['method']}`",
            short_length(row["length"]),
            str(sum(score is not None for score in row["tasks"].values())),
            str(row["n"]),
            percent(row["score_diff"] and row["baseline_score"] + row["score_diff"]["mean"], 1),
            percent(row["baseline_score"], 1),
            difference(row, "score_diff", 100, 1),
            difference(row),
            share_read(row),
        ]
        for row in data["in_reach"]
        if row["n"]
    ]
    return markdown(head, body)


def group_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods; the mean score per group of tasks by haystack, and length."""
    return _means(data, "groups", GROUPS)


def category_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods; the mean score per category of RULER's paper, and length."""
    return _means(data, "categories", CATEGORIES)


def by_task_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods; the mean score per task and length."""
    return _means(data, "tasks", {task: (task,) for task in data["tasks"]})


def _means(data: Mapping[str, Any], field: str, members: Mapping[str, Sequence[str]]) -> str:
    names = [name for name, tasks in members.items() if any(task in data["tasks"] for task in tasks)]
    head = ["method", *(f"{name}, {short_length(length)}" for name in names for length in data["lengths"])]
    body = []
    for method in _methods(data):
        found = [_find(data["overall"], method=method, length=length) for length in data["lengths"]]
        means = [percent(row[field].get(name) if row else None, 1) for name in names for row in found]
        body.append([f"`{method}`", *means])
    return markdown(head, body)


def interval_table(data: Mapping[str, Any], length: int) -> str:
    """Markdown, rows = tasks, columns = methods: `score [low, high]` at one length, and over all tasks."""
    methods = _methods(data)
    body = []
    for task in data["tasks"]:
        cells = [_find(data["cells"], method=method, task=task, length=length) for method in methods]
        body.append([task, *map(score_range, cells)])
    overall = [_find(data["overall"], method=method, length=length) for method in methods]
    return markdown(["task", *(f"`{m}`" for m in methods)], [*body, ["mean", *map(score_range, overall)]])


def score_range(row: Mapping[str, Any] | None) -> str:
    """`83.3 [61.0, 95.2]` in percent; the score alone where there is no interval."""
    if row is None or row["score"] is None:
        return "–"
    found = row["score_interval"]
    if found is None or found["low"] is None:
        return percent(row["score"], 1)
    return f"{percent(row['score'], 1)} [{percent(found['low'], 1)}, {percent(found['high'], 1)}]"


def effective_table(data: Mapping[str, Any]) -> str:
    """Markdown, a row per method: the effective length, the scores there and at the shortest length. Empty
    where no method has one."""
    body = []
    for row in data["methods"]:
        if found := row["effective_length"]:
            reached = "≥ " if found["length"] == found["of"] else ""
            scores = percent(found["base_score"], 1), percent(found["score"], 1)
            body.append([f"`{row['method']}`", f"{reached}{short_length(found['length'])}", *scores])
    head = ["method", "effective length", f"score at {short_length(data['lengths'][0])}", "score there"]
    return markdown(head, body) if body else ""


def effective_note(data: Mapping[str, Any]) -> list[str]:
    """The same as a sentence for a report; none where no method has one."""
    found = {row["method"]: row["effective_length"] for row in data["methods"] if row["effective_length"]}
    if not found:
        return []
    said = (
        f"{method} {'≥ ' if one['length'] == one['of'] else ''}{short_length(one['length'])}"
        for method, one in found.items()
    )
    base = f"at least {100 * EFFECTIVE:.0f} % of that at the shortest one"
    return [f"Effective length, the largest one whose score is {base}: {'; '.join(said)}."]


def task_table(data: Mapping[str, Any], length: int) -> str:
    """Markdown, rows = methods, columns = tasks at one length: `score (ΔNLL)`, `*` where 0 is excluded."""
    head = ["method", *data["tasks"], "mean"]
    body = []
    for method in _methods(data):
        cells = [f"`{method}`"]
        for task in data["tasks"]:
            cell = _find(data["cells"], method=method, task=task, length=length)
            cells.append(
                "–" if cell is None else f"{percent(cell['score'], 0)}{_bracketed(method, cell['nll_diff'])}"
            )
        row = _find(data["overall"], method=method, length=length)
        body.append([*cells, percent(row["score"] if row else None, 1)])
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
            short_length(row["length"]),
            str(row["n"]),
            *(percent(row[name], 1, " %") for name in ("prefill_density", "decode_density", "kv_read")),
            number(row["prefill_seconds"], 2),
            number(row["step_ms"], 1),
        ]
        for row in data["overall"]
        if row["n"]
    ]
    return markdown(head, body)


def needle_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods over all lengths and depths: score, ΔNLL, share read, seconds."""
    head = ["method", "n", "score", "ΔNLL (95 %)", "read", "prefill s/sample", "ms/decode step"]
    return markdown(head, [[f"`{row['method']}`", *row_cells(row)] for row in data["methods"]])


def perplexity_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods: the perplexity, its ratio to that of dense on the same windows, the NLL
    difference, keys read."""
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
        n, _, *rest = row_cells(row)
        found = row["nll_diff"]
        ratio = number(exp(found and found["mean"]), 4)
        body.append([f"`{row['method']}`", n, number(row["perplexity"], 2), ratio, *rest])
    return markdown(head, body)


def position_table(data: Mapping[str, Any], length: int) -> str:
    """The same as Markdown; empty without rows."""
    head, body = position_rows(data, length)
    return markdown(head, body) if body else ""


def position_rows(data: Mapping[str, Any], length: int) -> tuple[list[str], list[list[str]]]:
    """(head, rows), rows = positions, columns = methods: dense's perplexity, and each other method's ΔNLL. No
    rows where the results have no figures by position."""
    rows = [row for row in data["overall"] if row["length"] == length and row["n"] and row["by_position"]]
    body = []
    for part, first in enumerate(rows[0]["by_position"] if rows else ()):
        cells = [str(first["position"])]
        for row in rows:
            found = row["by_position"][part]
            dense = row["method"] == BASELINE
            cells.append(number(found["perplexity"], 2) if dense else difference(row | found))
        body.append(cells)
    names = (f"`{row['method']}` {'perplexity' if row['method'] == BASELINE else 'ΔNLL'}" for row in rows)
    return ["from position", *names], body


def fidelity_table(data: Mapping[str, Any]) -> str:
    """Markdown, rows = methods over all prompts: how often the most likely token is dense's, and the KL."""
    head = ["method", "n", "same top token (95 %)", "mean KL", "largest KL", "ΔNLL (95 %)", "read"]
    body = []
    for row in data["methods"]:
        kl = (number(row.get(name), 4) for name in ("kl", "kl_most"))
        body.append(
            [f"`{row['method']}`", str(row["n"]), score_range(row), *kl, difference(row), share_read(row)]
        )
    return markdown(head, body)


def harness_rows(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of lm-eval: a row for each task, metric and method."""
    head = ["task", "metric", "method", "n", "score", "± stderr", "Δ (95 %)", "read", "cut"]
    body = []
    for line in data["harness"]:
        read = "/".join(percent(line["density"][phase], 1) for phase in ("prefill", "decode"))
        for name, metrics in line["metrics"].items():
            for key, value in metrics.items():
                metric, _, rest = key.partition(",")
                error = metrics.get(f"{metric}_stderr,{rest}")
                if metric.endswith("_stderr") or not rest:
                    continue
                mine = metric == line["metric"]
                diff = difference({"method": line["method"], "nll_diff": line["diff"]}) if mine else "–"
                numbers = [str(line["n"]), number(value, 4), number(error, 4), diff, read]
                body.append([name, metric, line["method"], *numbers, str(line["prompts_cut"])])
    return head, body


def harness_table(data: Mapping[str, Any]) -> str:
    """The same as Markdown."""
    return markdown(*harness_rows(data))


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the rest to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def difference(row: Mapping[str, Any], name: str = "nll_diff", scale: float = 1, digits: int = 3) -> str:
    """`+0.12 [+0.05, +0.19]`, with the reason instead if there is no interval; a dash for dense itself and
    without pairs."""
    found = row.get(name)
    if found is None or row["method"] == BASELINE:
        return "–"
    mean, low, high = (
        None if found[x] is None else f"{scale * found[x]:+.{digits}f}" for x in ("mean", "low", "high")
    )
    return f"{mean} ({found['reason']})" if low is None else f"{mean} [{low}, {high}]"


def plus_minus(row: Mapping[str, Any]) -> str:
    """`+0.12 ± 0.07`; without an interval, what `difference` gives."""
    found = row.get("nll_diff")
    if found is None or found["low"] is None or row["method"] == BASELINE:
        return difference(row)
    return f"{found['mean']:+.3f} ± {found['high'] - found['mean']:.3f}"


def share_read(row: Mapping[str, Any]) -> str:
    """Shares of keys read, `prefill / decode` in percent."""
    return f"{percent(row['prefill_density'], 0)} / {percent(row['decode_density'], 1)} %"


def row_cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["n"]),
        percent(row["score"], 1),
        difference(row),
        share_read(row),
        number(row["prefill_seconds"], 2),
        number(row["step_ms"], 1),
    ]


def _bracketed(method: str, interval: Mapping[str, Any] | None) -> str:
    if interval is None or method == BASELINE:
        return ""
    sure = interval["low"] is not None and (interval["low"] > 0 or interval["high"] < 0)
    return f" ({interval['mean']:+.2f}{'*' if sure else ''})"


def _methods(data: Mapping[str, Any]) -> list[str]:
    return [row["method"] for row in data["methods"]]


def _find(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> Mapping[str, Any] | None:
    return next((row for row in rows if row.get("n") and all(row[k] == v for k, v in wanted.items())), None)


def percent(value: float | None, digits: int, unit: str = "") -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}{unit}"


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def short_length(length: int) -> str:
    """4096 as "4K", 1048576 as "1M"."""
    if length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
