"""The results of a GPU session beside the goals and what was predicted: ``python -m benchmarks.gpu_summary
FOLDER`` prints Markdown.

FOLDER holds what ``benchmarks/gpu.sh`` wrote: results as JSON, and ``stages.txt`` with a line for each stage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# predicted for a step with its selection, batch 8
_SELECTING = {"quest": "4 to 5", "double_sparsity": "2.5 to 3"}
_MS_A_TOKEN = {"unpatched": "20 to 25 (8B, 131,072 tokens, eager)"}
Line = tuple[str, str, str, str]  # what was measured, wanted, predicted before the first GPU minute, measured


def _block_sparse(rows: list[Row]) -> Iterator[Line]:
    """Time over (density x the fastest dense run): 1 would be a kernel as good as dense attention's."""
    for row in _of(rows, op="block_sparse", role="ours"):
        if row.get("density") and row.get("x dense"):
            over = 1 / (row["x dense"] * row["density"])
            name = f"{row['run']}, {row['length']:,} tokens, {row['at']}, time over density x dense"
            yield name, "<= 1.25", "1.5 to 1.65", f"{over:.2f}"


def _bandwidth(op: str, wanted: float, predicted: str) -> Callable[[list[Row]], Iterator[Line]]:
    def lines(rows: list[Row]) -> Iterator[Line]:
        for row in _of(rows, op=op, run=op, role="ours"):
            where = ", ".join(filter(None, (op, f"{row['length']:,} keys", row["at"])))
            yield f"{where}, share of copy bandwidth", f">= {wanted:.2f}", predicted, f"{row['of copy']:.2f}"

    return lines


def _gather(rows: list[Row]) -> Iterator[Line]:
    for row in _of(rows, op="gather_decode", role="ours"):
        if row.get("x dense"):
            wanted = ">= 8" if row["run"] == "gather_decode" else ">= 4"  # with the selection
            name = f"{row['run']}, {row['length']:,} keys, {row['at']}, x dense"
            yield name, wanted, _SELECTING.get(row["run"].split(" ")[0], ""), f"{row['x dense']:.1f}"


def _steps(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        if "step" in row and row.get("times faster"):
            yield (
                f"decode step, {row['step']}, x SDPA + DynamicCache",
                "> 1",
                "",
                f"{row['times faster']:.2f}",
            )


def _tiers(rows: list[Row]) -> Iterator[Line]:
    for row in _of(rows, memory="host"):
        if row.get("times faster than offloaded"):
            name = f"decode step, keys in host memory, {row['step']}, x transformers' offloaded cache"
            wanted = ">= 8" if row["step"].startswith("double_sparsity") else ""
            predicted = "5 to 10" if row["step"] == "dense" else "20 to 40"
            yield name, wanted, predicted, f"{row['times faster than offloaded']:.1f}"


def _scan(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        if row.get("x fla"):
            yield f"{row['run']}, {row['length']:,} tokens, x fla", ">= 0.8", "", f"{row['x fla']:.2f}"
        elif "x fla" in row and row.get("x dense") and row["impl"] != "torch":
            yield f"{row['run']}, {row['length']:,} tokens, x dense", "> 1", "", f"{row['x dense']:.2f}"


def _models(rows: list[Row]) -> Iterator[Line]:
    for row in rows:
        for phase in ("prefill", "decode"):
            if row.get("method", "unpatched") != "unpatched" and row.get(f"{phase} x"):
                yield f"{row['method']}, {phase}, x unpatched", ">= 1", "", f"{row[f'{phase} x']:.2f}"


def _launches(rows: list[Row]) -> Iterator[Line]:
    """Launches of a layer beyond those of the unpatched model's, which has launches of attention itself."""
    base = next(
        (row["launches a layer"] for row in _of(rows, method="unpatched") if "launches a layer" in row), None
    )
    for row in rows:
        if base is not None and "launches a layer" in row:
            name = f"{row['method']}, {row['tokens']:,} tokens"
            more = f"{row['launches a layer'] - base:+.1f}"
            wanted = "" if row["method"] == "unpatched" else "<= 0"
            yield f"{name}, launches of a layer and token beyond unpatched", wanted, "", more
            yield f"{name}, ms a token", "", _MS_A_TOKEN.get(row["method"], ""), f"{row['ms a token']:.1f}"


GOALS = (
    _block_sparse,
    _bandwidth("decode", 0.85, "0.80 to 0.90"),
    _bandwidth("gather_decode", 0.7, "0.60 to 0.68"),
    _gather,
    _steps,
    _scan,
    _models,
    _launches,
    _tiers,
)


def _of(rows: list[Row], **wanted: Any) -> Iterator[Row]:
    yield from (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))


def summary(folder: Path) -> str:
    """The stages, and every measured line beside what is wanted, by result file."""
    stages = folder / "stages.txt"
    said = stages.read_text().strip() if stages.exists() else "No stage has ended."
    parts = ["# A GPU session", "```text\n" + said + "\n```"]
    for path in sorted(folder.glob("*.json")):
        made = json.loads(path.read_text())
        about = ", ".join(f"{key} {value}" for key, value in made["machine"].items() if value)
        lines = [line for goal in GOALS for line in goal(made["rows"])]
        table = ["| what | wanted | predicted | measured |", "| --- | --- | --- | --- |"]
        table += [f"| {' | '.join(line)} |" for line in lines]
        parts += [f"## {path.stem}", about, "\n".join(table) if lines else "No goal is set for these rows."]
    return "\n\n".join(parts)


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("Give the folder that benchmarks/gpu.sh wrote its results to.")
    print(summary(Path(sys.argv[1])))


if __name__ == "__main__":
    main()
