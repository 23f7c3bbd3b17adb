"""A report in other forms: Markdown for a pull request, and its rows as a data frame, CSV or Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from . import report
from .folders import OTHERS, RULER, SPEED, Found
from .html.costs import break_even, speed_table
from .html.others import fidelities, harnesses, perplexities, recalls
from .html.page import page
from .html.settings import made
from .html.view import DROPS, Grid, headline
from .recommend import lengths_of
from .tables import by_task_table, effective_note, markdown, needle_table, reach_table, ruler_table

SUFFIXES = (".html", ".md", ".csv", ".parquet")
FLAT = {
    "depth": ("extra", "depth"),
    "prefill_density": ("density", "prefill"),
    "decode_density": ("density", "decode"),
    "prefill_s": ("seconds", "prefill"),
    "decode_s": ("seconds", "decode"),
}
"""Columns of the rows whose values stand inside another field: (field, name in it)."""


def check(targets: Sequence[Path]) -> None:
    """Raises FarspanError for a target whose suffix names no form, and for one that cannot be written."""
    for target in targets:
        if target.suffix.lower() not in SUFFIXES:
            raise FarspanError(
                f"{target} does not say what to write; give a name that ends in {', '.join(SUFFIXES)}."
            )
        if target.is_dir() or not os.access(target if target.exists() else _parent(target), os.W_OK):
            why = "is a folder" if target.is_dir() else "is not writable for this user"
            raise FarspanError(f"{target} cannot be written, because it {why}; give another --out.")


def write(
    found: Found, target: Path, *, drops: Sequence[float] = DROPS, confidence: float = 0.95, title: str = ""
) -> None:
    """Write the report in the form that the suffix of `target` names, in one step.

    Raises FarspanError for another suffix, a missing package, and a target that cannot be written.
    """
    check([target])
    suffix = target.suffix.lower()
    scratch = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".html":
            text = page(found, title=title or None, drops=drops, confidence=confidence)
            scratch.write_text(text, encoding="utf-8")
        elif suffix == ".md":
            text = as_markdown(found, drops=drops, confidence=confidence, title=title)
            scratch.write_text(text, encoding="utf-8")
        elif suffix == ".csv":
            frame(found).to_csv(scratch, index=False)
        else:
            frame(found).to_parquet(scratch, index=False)
        scratch.replace(target)
    except OSError as error:
        scratch.unlink(missing_ok=True) if scratch.parent.is_dir() else None
        raise FarspanError(f"{target} cannot be written: {error.strerror}; give another --out.") from None


def as_markdown(
    found: Found, *, drops: Sequence[float] = DROPS, confidence: float = 0.95, title: str = ""
) -> str:
    """The report for a pull request: headlines, tables, the break-even of speed, and the commands."""
    parts = [f"# {title or 'farspan report'}\n"]
    for one in found.answers():
        if lengths_of(one):
            head = headline(found, one, drops, confidence)
            method = f"`{head.method}` " if head.method else ""
            parts += [f"**{head.where}**: {method}{head.sentence}\n"]
            parts += [f"    {head.patch}\n"] if head.patch else []
            parts += [f"- {doubt}" for doubt in head.doubts] + [""]
    for one in found.evaluations:
        if one.suite in OTHERS:
            continue
        parts += [f"## {one.model}, {one.suite}\n"]
        parts += [ruler_table(one.data) if one.suite == RULER else needle_table(one.data)]
        if one.suite != RULER and len(one.data["tasks"]) > 1:
            parts += [by_task_table(one.data)]
        if any(row["n"] for row in one.data["in_reach"]):
            parts += ["Tasks in reach of dense:\n", reach_table(one.data)]
        notes = [*report.notes(one.data, short=True), *effective_note(one.data)]
        parts += [f"{note}\n" for note in notes]
    for one in found.of(SPEED):
        parts += [f"## Speed of {one.model}\n", _grid(break_even(one)), _grid(speed_table(one))]
    grids = [
        *perplexities(found),
        *fidelities(found),
        *harnesses(found),
        *(grid for grid, _ in recalls(found)),
    ]
    parts += [f"## {grid.caption}\n\n{_grid(grid)}" for grid in grids]
    parts += ["## Commands\n", *(f"    {line}\n" for one in found.evaluations for line in made(one).commands)]
    return "\n".join(parts).replace("<", "&lt;")  # no text of a result starts HTML


def _grid(grid: Grid) -> str:
    rows = [[f"`{row[0]}`" if grid.code else str(row[0]), *map(str, row[1:])] for row in grid.rows]
    return markdown(grid.columns, rows)


def frame(found: Found) -> Any:
    """Every row of the evaluations as a pandas data frame: model, dtype, suite, then the fields of a row.

    Fields with parts are columns of their own where `FLAT` names them; other objects and lists are JSON text.
    Raises FarspanError where pandas is missing.
    """
    try:
        import pandas
    except ImportError:
        raise FarspanError("Rows as a table need pandas: pip install 'farspan[evals]'.") from None
    rows = [
        {"model": one.model, "dtype": one.config.get("dtype"), "suite": one.suite, **_flat(row)}
        for one in found.evaluations
        for row in one.rows
    ]
    return pandas.DataFrame(rows)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = {field for field, _ in FLAT.values() if isinstance(row.get(field), dict)}
    out = {name: value for name, value in row.items() if name not in parts and name != "suite"}
    for name, (field, part) in FLAT.items():
        if isinstance(row.get(field), dict) and part in row[field]:
            out[name] = row[field][part]
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
        for name, value in out.items()
    }


def _parent(path: Path) -> Path:
    return next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
