"""A summary to what people read: a table for the terminal, and a folder's page of tables and its pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import pictures
from .results import Results
from .summary import BASELINE, REACH, RULER_TASKS
from .tables import (
    cost_table,
    group_table,
    needle_table,
    perplexity_table,
    plus_minus,
    reach_table,
    row_cells,
    ruler_table,
    short_length,
    task_table,
)


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
    for name in ("length", "n", "score", "ΔNLL ± 95 %", "read %", "prefill s", "ms/step"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in data["overall"]:
        if row["n"]:
            n, score, _, read, *seconds = row_cells(row)
            read = read.removesuffix(" %").replace(" ", "")
            table.add_row(
                row["method"], short_length(row["length"]), n, score, plus_minus(row), read, *seconds
            )
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
        if data["haystack"]:
            out.append(f"Text: {data['haystack']}.")
    if data["suite"] == "ruler" and set(data["tasks"]) != set(RULER_TASKS):
        out.append(f"{len(data['tasks'])} of RULER's 11 dataset-free tasks.")
    if not any(row["method"] == BASELINE for row in data["methods"]):
        out.append("Add the method dense to this folder to get paired differences.")
    if not data.get("complete", True):
        out.append("Stopped before the end: run the same command to resume.")
    if not data["one_machine"]:
        out.append("Sessions ran on different machines, threads or ranks: seconds are not comparable.")
    invalid = sum(row["nll_invalid"] for row in data["methods"])
    if invalid:
        out.append(f"{invalid} likelihoods were not finite and are left out of ΔNLL.")
    return out


def write(results: Results, data: Mapping[str, Any]) -> list[str]:
    """Write the tables and pictures of a folder beside its rows; returns the names written."""
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
        parts += [f"## {short_length(length)}\n\n{task_table(data, length)}" for length in data["lengths"]]
    text = "\n".join([*parts, cost_table(data), *(note + "\n" for note in notes(data))])
    name = f"{data['suite']}.md"
    results.write_text(name, text)
    return [name, *pictures.write(results, data)]
