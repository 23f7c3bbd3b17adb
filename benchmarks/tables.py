"""The tables of docs/RESULTS.md from the committed results.

    python -m benchmarks.tables

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`; `TABLES` says what it is made of. Everything
else on the page is written by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from farspan.evals.mqar import report as mqar
from farspan.evals.report import notes
from farspan.evals.results import read
from farspan.evals.summary import summarise
from farspan.evals.tables import (
    cost_table,
    group_table,
    markdown,
    percent,
    reach_table,
    ruler_table,
    short_length,
    task_table,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "RESULTS.md"
FOLDERS, FILES = ROOT / "docs" / "results", ROOT / "benchmarks" / "results"
_MARKED = re.compile(r"<!-- (\w+) -->\n.*?<!-- /\1 -->\n", re.DOTALL)
_OLD_NAMES = {"share=none": "gqa_reduce=none"}
"""Parameters that had another name when a file was recorded."""

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a file under benchmarks/results."""
    return list(json.loads((FILES / f"{name}.json").read_text())["rows"])


def table(rows: Iterable[Row], columns: Columns) -> str:
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def code(name: str) -> Callable[[Row], str]:
    """The column of a method, in today's names of its parameters."""

    def cell(row: Row) -> str:
        text = str(row[name])
        for old, new in _OLD_NAMES.items():
            text = text.replace(old, new)
        return f"`{text}`"

    return cell


def fixed(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: "–" if row.get(name) is None else f"{row[name]:,.{digits}f}"


def share(name: str, digits: int = 1) -> Callable[[Row], str]:
    return lambda row: percent(row.get(name), digits, " %")


@cache
def summary(folder: str) -> dict[str, Any]:
    return summarise(*read(FOLDERS / folder))


def ruler() -> str:
    data = summary("ruler")
    by_length = (f"{short_length(n)}:\n\n{task_table(data, n)}" for n in data["lengths"])
    said = "".join(f"- {note}\n" for note in notes(data))
    reach = f"Tasks in reach of the model:\n\n{reach_table(data)}"
    return "\n".join([ruler_table(data), reach, group_table(data), *by_length, cost_table(data), said])


def recall() -> str:
    config, rows = read(FOLDERS / "mqar")
    data = mqar.summarise(config, rows)
    return markdown(mqar.columns(data), [[f"`{name}`", *cells] for name, *cells in mqar.table_rows(data)])


def pairs() -> str:
    """Rows = prefill methods, columns = decode methods; the first row has the keys read at decode."""
    found = {(row["prefill"], row["decode"]): row for row in rows_of("pairs")}
    prefills, decodes = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    body = [["*keys read at decode*", *(share("decode keys", 0)(found["dense", name]) for name in decodes)]]
    for prefill in prefills:
        cells = [f"{x['ΔNLL']:+.3f} ± {x['±']:.3f}" for x in (found[prefill, name] for name in decodes)]
        first = f"`{prefill}` ({share('prefill keys', 0)(found[prefill, 'dense'])})"
        body.append(
            [
                first,
                *(
                    "–" if (prefill, d) == ("dense", "dense") else c
                    for d, c in zip(decodes, cells, strict=True)
                ),
            ]
        )
    return markdown(["prefill (keys read)", *(f"`{name}`" for name in decodes)], body)


def dispatch() -> str:
    """A row for each method on a cache that grows."""
    found = {(row["method"], row["device"], row["batch"]): row for row in rows_of("dispatch")}
    body = []
    for method, device, batch in found:
        if (device, batch) != ("cuda", "one row") or method.endswith(" static"):
            continue
        one, padded = found[method, "cuda", "one row"], found[method, "cuda", "padded"]
        waits = sum(row[name] for row in (one, padded) for name in ("waits", "copies"))
        cells = [one["prefill"], one["step"], one["largest step"], padded["step"], waits]
        body.append([f"`{method}`", *map(str, [*cells, found[method, "cpu", "one row"]["step"]])])
    return markdown(
        ["method", "prefill", "step", "largest step", "step, padded", "waits + copies", "step on the CPU"],
        body,
    )


def static() -> str:
    """The same step on a cache that grows and on one of fixed size, without the launch for all layers."""
    found = {(row["method"], row["batch"]): row for row in rows_of("dispatch") if row["device"] == "cuda"}
    body = []
    for method, batch in found:
        if method.endswith(" static") and batch == "one row":
            name = method.removesuffix(" static")
            grows = [found[name, size][step] for size in ("one row", "padded") for step in _STEPS]
            fixed_size = [found[method, size][step] - 1 for size in ("one row", "padded") for step in _STEPS]
            body.append([f"`{name}`", *map(str, grows + fixed_size)])
    kinds = ("step", "largest", "padded", "padded, largest")
    heads = [f"{cache}: {kind}" for cache in ("growing", "`static=N`") for kind in kinds]
    return markdown(["method", *heads], body)


_STEPS = ("step", "largest step")


def ops(op: str, length: int) -> str:
    rows = [row for row in rows_of("ops_cpu") if (row["op"], row["length"]) == (op, length)]
    selected = [row for row in rows if row["role"] != "selection"]
    return table(
        selected,
        {
            "run": code("run"),
            "at": lambda row: row["at"] or "dense",
            "ms": fixed("ms", 1),
            "times dense": fixed("x dense", 2),
        },
    )


def kernels() -> str:
    """Every kernel with its worst form."""
    by_kernel: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of("compile_sm90"):
        by_kernel.setdefault((row["op"], row["kernel"]), []).append(row)
    body = []
    for (op, kernel), rows in by_kernel.items():
        worst = max(rows, key=lambda row: row["spilled"])
        form = f"{worst['dtype']} D {worst['D']}, {worst['tile']}, {worst['warps']} warps"
        form += f", {worst['stages']} stages"
        most, shared = (max(row[name] for row in rows) for name in ("registers", "shared"))
        cells = [len(rows), most, f"{shared / 1024:.0f}", worst["spilled"], form if worst["spilled"] else ""]
        body.append([f"{op} `{kernel}`", *map(str, cells)])
    heads = [
        "operation and kernel",
        "programs",
        "most registers",
        "most shared KB",
        "worst spill",
        "its form",
    ]
    return markdown(heads, body)


def whole_model(*files: str) -> str:
    """Rows of `benchmarks.generate`; columns without any value are left out."""
    rows = [row for name in files for row in rows_of(name)]
    columns: dict[str, tuple[str, Callable[[Row], str]]] = {
        "tokens": ("tokens", fixed("tokens", 0)),
        "prefill s": ("prefill s", fixed("prefill s", 1)),
        "× unpatched": ("prefill x", fixed("prefill x", 2)),
        "tokens/s": ("tokens/s", fixed("tokens/s", 1)),
        "× unpatched, decode": ("decode x", fixed("decode x", 2)),
        "keys read in prefill": ("prefill keys", share("prefill keys")),
        "at decode": ("decode keys", share("decode keys")),
        "peak GB": ("peak GB", fixed("peak GB", 1)),
    }
    kept = {head: cell for head, (name, cell) in columns.items() if any(name in row for row in rows)}
    return table(rows, {"method": code("method")} | kept)


TABLES: dict[str, Callable[[], str]] = {
    "ruler": ruler,
    "ruler_prefill": lambda: reach_table(summary("ruler_prefill")),
    "ruler_long": lambda: ruler_table(summary("ruler_long")),
    "ruler_long_16k": lambda: task_table(summary("ruler_long"), 16384),
    "ruler_long_4k": lambda: task_table(summary("ruler_long"), 4096),
    "mqar": recall,
    "selection": lambda: table(
        rows_of("selection"),
        {
            "method": code("method"),
            "keys read": share("density"),
            "mass recall": share("mass recall"),
            "least of a layer": share("least of a layer"),
            "selection, of the attention's time": share("of the time"),
        },
    ),
    "pairs": pairs,
    "decode_step": lambda: table(
        rows_of("decode_step"),
        {"step": code("step"), "ms": fixed("ms", 1), "times faster": fixed("times faster", 1)},
    ),
    "dispatch": dispatch,
    "static": static,
    "host_time": lambda: table(
        rows_of("host_time"),
        {
            "method": code("method"),
            "CPU µs before": fixed("CPU us before", 0),
            "after": fixed("CPU us", 0),
            "added before": fixed("added before", 0),
            "added after": fixed("added", 0),
        },
    ),
    "block_sparse": lambda: ops("block_sparse", 16384),
    "gather_decode": lambda: ops("gather_decode", 131072),
    "compile": kernels,
    "generate": lambda: whole_model("generate"),
    "generate_qwen": lambda: whole_model("generate_qwen"),
    "first_token": lambda: whole_model("generate_4k", "generate_32k"),
    "evals_overhead": lambda: table(
        rows_of("evals_overhead"),
        {"part": lambda row: row["part"], "s": fixed("s", 2), "share": share("share of the whole", 2)},
    ),
}
"""What stands between the marks of each name."""


def filled(text: str) -> str:
    """The page with every marked table made anew. Raises KeyError for an unknown name."""
    return _MARKED.sub(lambda found: f"<!-- {found[1]} -->\n{TABLES[found[1]]()}<!-- /{found[1]} -->\n", text)


def main() -> None:
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    PAGE.write_text(after, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {'as it was' if after == before else 'made anew'}")


if __name__ == "__main__":
    main()
