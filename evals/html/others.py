"""The tables of a report for evaluations without a scored answer for each prompt."""

from __future__ import annotations

from ..folders import FIDELITY, FROM_SCRATCH, HARNESS, PERPLEXITY, Found
from ..mqar import report as mqar
from ..mqar.settings import NAMES
from ..tables import difference, exp, number, percent, position_rows, share_read, short_length
from .view import Cell, Grid


def perplexities(found: Found) -> list[Grid]:
    """A table for each evaluation of perplexity, and one by position for each of its lengths."""
    head = ["method", "length", "windows", "perplexity", "÷ dense's", "ΔNLL (95 %)", "read"]
    out = []
    for one in found.of(PERPLEXITY):
        rows: list[list[Cell | str]] = [
            [
                row["method"],
                short_length(row["length"]),
                str(row["n"]),
                number(row["perplexity"], 2),
                number(exp(row["nll_diff"] and row["nll_diff"]["mean"]), 4),
                difference(row),
                share_read(row),
            ]
            for row in one.data["overall"]
            if row["n"]
        ]
        how = ", sliding windows" if one.config.get("sliding") else ""
        what = f"{one.model} on {one.data['haystack']}{how}"
        out.append(Grid(f"Perplexity of {what}", head, rows))
        for length in one.data["lengths"]:
            columns, lines = position_rows(one.data, length)
            columns = [name.replace("`", "") for name in columns]
            if lines:
                caption = f"Perplexity by position of {what}, {short_length(length)} tokens"
                out.append(Grid(caption, columns, [list(line) for line in lines], code=False))
    return out


def fidelities(found: Found) -> list[Grid]:
    """A table for each evaluation of fidelity: how often dense's top token is the method's, and the KL."""
    head = ["method", "prompts", "same top token", "KL (nats)", "largest KL", "ΔNLL (95 %)", "read"]
    out = []
    for one in found.of(FIDELITY):
        rows: list[list[Cell | str]] = [
            [
                row["method"],
                str(row["n"]),
                percent(row["score"], 1, " %"),
                number(row.get("kl"), 4),
                number(row.get("kl_most"), 4),
                difference(row),
                share_read(row),
            ]
            for row in one.data["methods"]
        ]
        out.append(
            Grid(f"Next-token distributions of {one.model} beside dense's, on given prompts", head, rows)
        )
    return out


def harnesses(found: Found) -> list[Grid]:
    """A table for each evaluation by the lm-evaluation-harness: its score of each task."""
    out = []
    for one in found.of(HARNESS):
        tasks = list(dict.fromkeys(row["task"] for row in one.rows))
        scores = {(row["method"], row["task"]): row["score"] for row in one.rows}
        rows: list[list[Cell | str]] = [
            [method, *(percent(scores.get((method, task)), 1) for task in tasks)]
            for method in dict.fromkeys(row["method"] for row in one.rows)
        ]
        caption = f"Scores of the lm-evaluation-harness in percent, {one.model}"
        out.append(Grid(caption, ["method", *tasks], rows))
    return out


def recalls(found: Found) -> list[tuple[Grid, list[str]]]:
    """A table for each evaluation of models trained from scratch, with its notes."""
    out = []
    for one in (one for one in found.evaluations if one.suite in FROM_SCRATCH):
        columns, rows = mqar.columns(one.data), mqar.table_rows(one.data)
        caption = f"{NAMES[one.suite]}: accuracy in percent by setting, two-layer models trained from scratch"
        out.append((Grid(caption, columns, [list(row) for row in rows]), mqar.notes(one.data)))
    return out
