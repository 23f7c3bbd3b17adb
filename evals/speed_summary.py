"""The rows of `eval speed`, and their summary: medians, ratios to the baseline, spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from types import NoneType
from typing import Any

from .results import ROW, Replica, Results
from .run import Summary
from .shape import MAYBE_NUMBER, NUMBER
from .speed_tables import speed_table

UNPATCHED, DENSE = "unpatched", "dense"
_PREFILL, _DECODE = "prefill_seconds", "decode_tokens_per_second"
_HIGHEST = (
    "peak_memory_bytes",
    "kv_bytes_stored",
    "kv_bytes_on_device",
    "kv_bytes_read_per_token",
    "prefill_sent_bytes",
    "decode_sent_bytes_per_token",
)
_ENERGY = ("prefill_joules", "decode_joules_per_token")
TIMING: dict[str, Any] = {
    **ROW,
    "length": int,
    "prefill_seconds": NUMBER,
    "decode_tokens_per_second": NUMBER,
    "session": (int, NoneType),
    **dict.fromkeys(("prefill_density", "decode_density", "score", *_HIGHEST), MAYBE_NUMBER),
}
"""The fields that the summary needs in a row."""


def highest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def finish(results: Results) -> Summary:
    """Write summary.json and the table from the folder's rows (on the first rank)."""
    data = summarise(results.config, results.rows)
    data["unfinished"] = results.unfinished()
    data["complete"] = not data["unfinished"]
    if not isinstance(results, Replica):
        results.write_summary(data)
        title = f"# speed: {data['model']} ({data['dtype']})"
        results.write_text("speed.md", f"{title}\n\n{speed_table(data)}")
    return Summary(out=results.out, data=data, complete=data["complete"], files=["speed.md"])


def summarise(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over repeats per (method, length), and ratios to the baseline of the same sessions.

    A ratio above 1 is faster; it is None if those sessions have no baseline. Cells without rows are left out.
    """
    baseline = config.get("baseline", UNPATCHED)
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["length"], row["method"]), []).append(row)
    overall = [
        {
            "method": method,
            "length": length,
            **_cell(cells[length, method], cells.get((length, baseline), [])),
        }
        for length in sorted(config["lengths"])
        for method in dict.fromkeys([baseline, *config["methods"]])
        if (length, method) in cells
    ]
    named = ("suite", "model", "dtype", "versions", "baseline", "new_tokens", "batch_size", "ranks")
    sessions = len({row.get("session") for row in rows})
    return {**{name: config.get(name) for name in named}, "sessions": sessions, "overall": overall}


def _cell(rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "repeats": len(rows),
        **{name: median(row[name] for row in rows) for name in (_PREFILL, _DECODE)},
        **{f"{name}_range": _range(rows, name) for name in (_PREFILL, _DECODE)},
        "prefill_speedup": _ratio(baseline, rows, _PREFILL),
        "decode_speedup": _ratio(rows, baseline, _DECODE),
        **{name: rows[0].get(name) for name in ("prefill_density", "decode_density", "score")},
        **{name: highest([row.get(name) for row in rows]) for name in _HIGHEST},
        **{name: _median([row.get(name) for row in rows]) for name in _ENERGY},
    }


def _range(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The lowest and the highest value, over all sessions."""
    values = [row[name] for row in rows]
    return [min(values), max(values)]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _ratio(above: Sequence[Mapping[str, Any]], below: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The median over sessions of the ratio of medians within a session, weighted by its number of rows."""
    ratios = []
    for session in {row.get("session") for row in (*above, *below)}:
        values = [[row[name] for row in rows if row.get("session") == session] for rows in (above, below)]
        if all(values):
            ratios += [median(values[0]) / median(values[1])] * min(map(len, values))
    return median(ratios) if ratios else None
