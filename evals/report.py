"""A summary as a table for the terminal, and as the Markdown page and pictures of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.table import Table
from . import depths, pictures, speed_tables
from .results import Results, unfinished_note
from .stats import FEWEST, NO_SPREAD, TOO_FEW
from .summary import BASELINE, EFFECTIVE, REACH, RULER_TASKS
from .tables import (
    by_task_table,
    category_table,
    cost_table,
    effective_table,
    fidelity_table,
    group_table,
    harness_rows,
    harness_table,
    interval_table,
    needle_table,
    number,
    perplexity_table,
    plus_minus,
    position_table,
    reach_table,
    row_cells,
    ruler_table,
    short_length,
    task_table,
)

_REASONS = {
    TOO_FEW: f"an interval needs {FEWEST} prompts",
    NO_SPREAD: "all differences are equal, so no interval can be given",
}


def terminal_table(data: Mapping[str, Any]) -> Table:
    """One row per method and length, for the terminal; of turns, one per method, length and turn."""
    if data["suite"] == "speed":
        return speed_tables.terminal_table(data)
    quality = {"ppl": "perplexity", "fidelity": "same top %"}.get(data["suite"], "score")
    fidelity = ("KL", "most") if data["suite"] == "fidelity" else ()
    names = ("length", "n", quality, *fidelity, "ΔNLL ± 95 %", "read %", "prefill s", "ms/step")
    title, caption = f"{data['suite']} · {data['model']}", " ".join(notes(data, short=True))
    if data["suite"] == "lm-eval":
        head, body = harness_rows(data)
        table = Table(*head, title=title, caption=caption, numbers_from=3)
        for cells in body:
            table.add_row(*cells)
        return table
    table = Table("method", *names, title=title, caption=caption, numbers_from=1)
    turns = data["suite"] == "turns"
    for row in data["cells" if turns else "overall"]:
        if row["n"]:
            n, score, _, read, *seconds = row_cells(row)
            read = read.removesuffix(" %").replace(" ", "")
            score = number(row["perplexity"], 2) if quality == "perplexity" else score
            where = short_length(row["length"]) + (f" {row['task']}" if turns else "")
            kl = [number(row.get(name), 4) for name in ("kl", "kl_most")] if fidelity else []
            table.add_row(row["method"], where, n, score, *kl, plus_minus(row), read, *seconds)
    return table


def notes(data: Mapping[str, Any], *, short: bool = False) -> list[str]:
    """Sentences that explain the numbers. short: those for the terminal."""
    out = ["read: share of keys read in prefill / decode."]
    if not short:
        out = [
            "Score: mean over tasks of the published metric, in percent (greedy answers). ΔNLL: negative "
            "log-likelihood of the gold answer per token (nats) under teacher forcing through the method's "
            "own decode path, minus dense on the same prompts, with the 95 % t interval over prompts within "
            "tasks. Read: share of the causal (query, key) pairs read in prefill / decode; KV bytes counts "
            "summaries too. Seconds are a sample's share of its batch."
        ]
        if data["suite"] in ("ppl", "fidelity"):  # their own sentence about the score stands below
            out[0] = out[0][out[0].index("ΔNLL") :].replace("gold answer", "scored tokens")
        if data["suite"] == "ruler":
            out.append(
                f"In the tables of tasks * marks a ΔNLL whose interval excludes 0; it takes {FEWEST} prompts."
            )
        if any(row["effective_length"] for row in data["methods"]):
            out.append(
                "Effective length: the largest length whose score is at least "
                f"{100 * EFFECTIVE:.0f} % of that at the shortest one; ≥ where it is the longest length."
            )
        if data["suite"] == "ruler" and any(row["n"] for row in data["in_reach"]):
            out.append(
                "In reach: tasks chosen by dense's own score on these same prompts. That favours tasks on "
                "which dense was lucky or unlucky with these prompts, and no interval counts that. Score and "
                "dense are over the same prompts; Δscore is paired like ΔNLL. The interval of Δscore counts "
                "one prompt more at -100 and one at +100, divided among the tasks, and ends at ±100."
            )
        counts = sorted({cell["n"] for cell in data["cells"]})
        out.append(f"Samples a cell: {' to '.join(str(n) for n in dict.fromkeys(counts[:1] + counts[-1:]))}.")
        where = depths.note(data["cells"])
        out += [where] if where else []
        if data["suite"] == "fidelity":
            out.append(
                "The score is the share of tokens at which dense and the method have the same most likely "
                "token, along dense's own greedy answers; KL is KL(dense || method) in nats. Length: the "
                "power of two that holds prompt and answer."
            )
        if data["suite"] == "turns":
            out.append(
                "Turns: each question is a turn of one conversation on one cache. After each turn the right "
                "answer goes into the conversation, so all methods read the same one. The turns of a "
                "conversation are not independent, so intervals over them count conversations."
            )
            reused = [cell["reused_tokens"] for cell in data["cells"] if cell.get("reused_tokens")]
            if reused:
                out.append(
                    f"A turn after the first has reused {number(sum(reused) / len(reused), 0)} tokens on "
                    "average; its prefill, and the seconds of it, are those of the other tokens."
                )
        if data["suite"] == "ppl":
            out.append(
                "Perplexity: exp of the mean negative log-likelihood over the windows. A decode step here is "
                "a token of a call of up to 16; a token that is generated takes a call of its own."
            )
        if data["haystack"]:
            out.append(f"Text: {data['haystack']}.")
    if short and data["suite"] == "fidelity":
        out.append("KL: of dense's distribution to the method's, nats per token; most: of a single token.")
    if data["suite"] == "ruler" and set(data["tasks"]) != set(RULER_TASKS):
        out.append(f"{len(data['tasks'])} of RULER's {len(RULER_TASKS)} tasks.")
    if data["suite"] == "lm-eval":
        out.append(
            "Δ: paired difference of the task's first metric from dense over the documents. cut: prompts "
            "whose middle was cut out, because they were longer than the model's positions. A log-likelihood "
            "is one call, in which a method's decode has no part."
        )
    if not any(row["method"] == BASELINE for row in data["methods"]):
        out.append("Add the method dense to this folder to get paired differences.")
    out += [*unfinished_note(data), *data.get("stopped", [])]
    if not data["one_machine"]:
        out.append("Sessions ran on different machines, threads or ranks: seconds are not comparable.")
    reasons = {(row["nll_diff"] or {}).get("reason") for row in data["overall"] + data["in_reach"]}
    out += [f"{reason}: {why}." for reason, why in _REASONS.items() if reason in reasons]
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
        if data["tasks"] != ["needle"]:
            parts.append(f"## By task\n\n{by_task_table(data)}")
    elif data["suite"] == "ppl":
        parts = [title, perplexity_table(data)]
        for length in data["lengths"]:
            if table := position_table(data, length):
                parts.append(f"## By position in {short_length(length)}\n\n{table}")
    elif data["suite"] == "fidelity":
        parts = [title, fidelity_table(data)]
    elif data["suite"] == "lm-eval":
        parts = [title, harness_table(data), *(note + "\n" for note in notes(data, short=True))]
        results.write_text("lm-eval.md", "\n".join(parts))
        return ["lm-eval.md"]
    else:
        parts = [title, ruler_table(data)]
        if any(row["n"] for row in data["in_reach"]):
            low, high = (f"{100 * x:.0f}" for x in REACH)
            parts.append(
                f"## Tasks in reach: dense scores {low} to {high} on these prompts\n\n{reach_table(data)}"
            )
        if data["suite"] == "ruler":
            parts.append(f"## By category\n\n{category_table(data)}")
            parts.append(f"## By haystack\n\n{group_table(data)}")
        parts += [
            f"## {short_length(length)}\n\n{task_table(data, length)}\n{interval_table(data, length)}"
            for length in data["lengths"]
        ]
    if effective := effective_table(data):
        parts.append(f"## Effective length\n\n{effective}")
    text = "\n".join([*parts, cost_table(data), *(note + "\n" for note in notes(data))])
    name = f"{data['suite']}.md"
    results.write_text(name, text)
    return [name, *pictures.write(results, data)]
