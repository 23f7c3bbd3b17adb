"""Make a summary of rows: per cell (method, task, length and, for needle, a depth) and overall.

Methods are compared with `dense` on the same samples: `nll_diff` and `score_diff` are paired differences with
their 95 % interval (see stats.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import depths
from .stats import paired, strata, stratified_interval

BASELINE = "dense"
REACH = (0.2, 0.95)  # of dense's mean score on a task; outside, all methods look alike
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
    "qa_1",
    "qa_2",
)
"""RULER's 13 tasks, as published."""
_NOISE, _WORDS, _DOCUMENTS = ("niah_single_1", "vt"), ("cwe", "fwe"), ("qa_1", "qa_2")
GROUPS = {
    "essay and needles": tuple(task for task in RULER_TASKS if task not in _NOISE + _WORDS + _DOCUMENTS),
    "noise": _NOISE,
    "word lists": _WORDS,
    "documents": _DOCUMENTS,
}
"""RULER's tasks by haystack. Noise is one text repeated, which flatters sparse methods: it is a group of its
own."""
CATEGORIES = {
    "retrieval": tuple(task for task in RULER_TASKS if task.startswith("niah")),
    "multi-hop": ("vt",),
    "aggregation": _WORDS,
    "question answering": _DOCUMENTS,
}
"""RULER's tasks by what they ask for, as in the paper's tables of averages."""
EFFECTIVE = 0.85
"""A length is effective if the score is at least this share of that at the shortest length, as in NoLiMa
(2502.05167)."""


def summarise(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of summary.json: `cells`, `overall` (per method and length), `in_reach` (the same over the
    tasks on which dense scores within REACH, on these same prompts) and `methods` (over all lengths)."""
    suite = config.get("suite") or (rows[0]["suite"] if rows else None)
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
                            **_cell(method, here, base),
                            **depths.of_rows(here),
                        }
                    )
            overall.append({"method": method, "length": length, **_overall(method, index, tasks, [length])})
            within = _in_reach(index, tasks, length)
            reach.append({"method": method, "length": length, **_overall(method, index, within, [length])})
        total = {"method": method, **_overall(method, index, tasks, lengths)}
        effective = None if suite == "fidelity" else _effective_length(method, index, tasks, lengths)
        totals.append(total | {"effective_length": effective})
    sessions = config.get("sessions", [])
    if suite == "ppl":
        for line in (*overall, *totals):
            line["perplexity"] = exp(line.get("nll"))
        for line in overall:
            line["by_position"] = _by_position(line["method"], index, line["length"])
    return {
        "suite": suite,
        **({"harness": _of_harness(rows)} if suite == "lm-eval" else {}),
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
        "in_reach_chosen_by": "dense's mean score on the same prompts",
        "methods": totals,
    }


def _in_reach(
    index: Mapping[tuple[str, str, int], list[Mapping[str, Any]]], tasks: list[str], length: int
) -> list[str]:
    """The tasks that can tell methods apart at this length: those on which dense scores within REACH."""
    low, high = REACH
    scores = {task: _mean(row["score"] for row in index.get((BASELINE, task, length), ())) for task in tasks}
    return [task for task, score in scores.items() if score is not None and low <= score <= high]


def _effective_length(
    method: str,
    index: Mapping[tuple[str, str, int], list[Mapping[str, Any]]],
    tasks: list[str],
    lengths: list[int],
) -> dict[str, Any] | None:
    """The largest length whose score is at least `EFFECTIVE` of that at the shortest length, over the tasks
    that have rows at every length: {"length", "of", "base_score", "score", "tasks"}. `of` is the longest
    length, so an effective length that equals it may be larger. None with one length, or if the base is 0 or
    unknown."""
    common = [task for task in tasks if all((method, task, length) in index for length in lengths)]
    scores = {
        length: _mean(_mean(row["score"] for row in index[method, task, length]) for task in common)
        for length in lengths
    }
    base = scores[lengths[0]]
    if len(lengths) < 2 or not base:
        return None
    effective = max(n for n, score in scores.items() if score is not None and score >= EFFECTIVE * base)
    found = {"length": effective, "of": lengths[-1], "base_score": base, "score": scores[effective]}
    return found | {"tasks": len(common)}


def _cell(
    method: str, rows: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    nll, score = _differences(rows, base, "nll"), _differences(rows, base, "score")
    return {
        "n": len(rows),
        **_costs(rows),
        "score_interval": _score_interval(rows),
        "nll_diff": _interval(method, nll),
        "score_diff": _interval(method, score, bound=1),
        "nll_invalid": sum(row["nll"] is None and row["gold_tokens"] > 0 for row in rows),
        "fallbacks": sorted({reason for row in rows for reason in row.get("fallbacks") or ()}),
    }


def _overall(
    method: str,
    index: Mapping[tuple[str, str, int], list[Mapping[str, Any]]],
    tasks: list[str],
    lengths: list[int],
) -> dict[str, Any]:
    """Means over the (task, length) cells. Each cell has the same weight, however many samples it has."""
    groups = {(t, n): index[method, t, n] for t in tasks for n in lengths if (method, t, n) in index}
    costs = [_costs(rows) for rows in groups.values()]
    by_task = {
        task: _mean(_mean(r["score"] for r in rows) for (t, _), rows in groups.items() if t == task)
        for task in tasks
    }
    every = [row for rows in groups.values() for row in rows]
    base = [row for cell in groups for row in index.get((BASELINE, *cell), ())]
    nll, score = _differences(every, base, "nll"), _differences(every, base, "score")
    return {
        "n": sum(len(rows) for rows in groups.values()),
        "baseline_score": _mean(
            _mean(base["score"] for base in index.get((BASELINE, *cell), ()) if base["key"] in keys)
            for cell, keys in ((cell, {row["key"] for row in rows}) for cell, rows in groups.items())
        ),
        **({name: _mean(cost.get(name) for cost in costs) for name in costs[0]} if costs else {}),
        **({"kl_most": max(cost["kl_most"] for cost in costs)} if costs and "kl_most" in costs[0] else {}),
        "tasks": by_task,
        "groups": {name: _mean(by_task.get(task) for task in members) for name, members in GROUPS.items()},
        "categories": {name: _mean(map(by_task.get, members)) for name, members in CATEGORIES.items()},
        "score_interval": _score_interval(every),
        "nll_diff": _interval(method, nll),
        "score_diff": _interval(method, score, bound=1),
        "nll_invalid": sum(row["nll"] is None and row["gold_tokens"] > 0 for row in every),
    }


def _costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    return {
        "score": _mean(row["score"] for row in rows),
        "nll": _mean(row["nll"] for row in rows),
        **_of_fidelity(rows),
        **_of_turns(rows),
        "prefill_density": _mean(row["density"]["prefill"] for row in rows),
        "decode_density": _mean(row["density"]["decode"] for row in rows),
        "kv_read": _mean(row["kv_read"] for row in rows),
        "prefill_seconds": _mean(row["seconds"]["prefill"] for row in rows),
        "decode_seconds": _mean(row["seconds"]["decode"] for row in rows),
        "step_ms": _mean(
            1e3 * row["seconds"]["decode"] * row["batch"] / max(row["steps"], 1) for row in rows
        ),
    }


def _of_turns(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean number of tokens that a turn of a conversation has not read again."""
    reused = [row["reused_tokens"] for row in rows if "reused_tokens" in row]
    return {"reused_tokens": _mean(reused)} if reused else {}


def _by_position(
    method: str, index: Mapping[tuple[str, str, int], list[Mapping[str, Any]]], length: int
) -> list[dict[str, Any]]:
    """For each part of the scored tokens its first "position", its "perplexity", and "nll_diff": the
    difference from dense on the same windows. Empty for rows of earlier versions."""
    mine, base = (
        {
            row["key"]: row["by_position"]
            for row in index.get((name, "text", length), ())
            if row.get("by_position")
        }
        for name in (method, BASELINE)
    )
    found = []
    for part, (position, _) in enumerate(next(iter(mine.values()), [])):
        nlls = {key: parts[part][1] for key, parts in mine.items()}
        pairs = paired(nlls, {key: parts[part][1] for key, parts in base.items()})
        difference = _interval(method, [list(pairs.values())])
        found.append({"position": position, "perplexity": exp(_mean(nlls.values())), "nll_diff": difference})
    return found


def _of_harness(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each method and task of lm-eval, with the harness's metrics, and `diff`, the paired
    difference from dense of the first metric over the documents."""
    rows = list(rows)
    base = {row["task"]: row["scores"] for row in rows if row["method"] == BASELINE}
    names = ("method", "task", "metric", "metrics", "score", "longest_prompt", "prompts_cut", "density")
    lines = []
    for row in rows:
        pairs = list(paired(row["scores"], base.get(row["task"], {})).values())
        diff = stratified_interval([pairs]) if row["method"] != BASELINE else None
        shown = {name: row[name] for name in names} | {"n": len(row["scores"])}
        lines.append(shown | {"diff": None if diff is None else diff.to_dict()})
    return lines


def _of_fidelity(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What only rows of fidelity have: "kl", the mean over prompts, and "kl_most", the largest of any
    token."""
    known = [row for row in rows if row.get("kl") is not None]
    if not known:
        return {}
    return {"kl": _mean(row["kl"] for row in known), "kl_most": max(row["kl_most"] for row in known)}


def _differences(
    rows: Sequence[Mapping[str, Any]], base: Iterable[Mapping[str, Any]], name: str
) -> list[list[float]]:
    found = paired({r["key"]: r[name] for r in rows}, {r["key"]: r[name] for r in base})
    return strata((row, found[row["key"]]) for row in rows if row["key"] in found)


def _ordered(tasks: Iterable[str]) -> list[str]:
    published = {task: i for i, task in enumerate(RULER_TASKS)}
    return sorted(tasks, key=lambda task: (published.get(task, len(published)), task))


def _mean(values: Iterable[float | None]) -> float | None:
    kept = [value for value in values if value is not None and math.isfinite(value)]
    return sum(kept) / len(kept) if kept else None


def exp(nll: float | None) -> float | None:
    """The perplexity of a mean NLL; infinity if it overflows a float."""
    try:
        return None if nll is None else math.exp(nll)
    except OverflowError:
        return math.inf


def _score_interval(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The interval of a mean score over one or several cells. Scores lie within 0 .. 1."""
    halves = ((row, row["score"] - 0.5) for row in rows if row["score"] is not None)
    found = stratified_interval(strata(halves), bound=0.5)
    if found is None:
        return None
    moved = {name: None if x is None else x + 0.5 for name, x in (("low", found.low), ("high", found.high))}
    return found.to_dict() | moved | {"mean": found.mean + 0.5}


def _interval(
    method: str, groups: Iterable[Sequence[float]], bound: float | None = None
) -> dict[str, Any] | None:
    """The interval of the differences from dense over one or several cells; for dense itself, the mean
    alone."""
    found = stratified_interval(groups, bound=bound)
    if found is not None and method == BASELINE:
        found = replace(found, low=None, high=None, reason="compared with itself")
    return None if found is None else found.to_dict()
