"""The tables of ``eval speed``: for a file, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..runtime.table import Table
from .results import unfinished_note
from .tables import markdown, number, percent, share_read


def speed_table(data: Mapping[str, Any]) -> str:
    """Markdown: a row per method and length, with the spread of the times and the bytes of the KV cache."""
    head, rows = wide(data)
    body = [[f"`{cells[0]}`", *cells[1:]] for cells in rows]
    return f"{markdown(head, body)}\n{_caption(data)}\n"


def wide(data: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of that table, as text."""
    head = [f"× {data['baseline']}" if name == "×" else name for name in _head(data)]
    rows = _cells(data)
    for name, cell in _MORE.items():
        found = [cell(row) for row in data["overall"]]
        if any(found):
            head.append(name)
            rows = [[*cells, text or "–"] for cells, text in zip(rows, found, strict=True)]
    return head, rows


def _spread(name: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
    def cell(row: Mapping[str, Any]) -> str:
        low, high = row.get(name) or (None, None)
        return "" if low is None or row["repeats"] < 2 else f"{low:.{digits}f} to {high:.{digits}f}"

    return cell


def _bytes(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row.get(name) is None else _size(row[name])


def _joules(row: Mapping[str, Any]) -> str:
    values = [row.get(name) for name in ("prefill_joules", "decode_joules_per_token")]
    return " / ".join("–" if x is None else f"{x:.3g}" for x in values) if any(values) else ""


_MORE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "prefill s, lowest to highest": _spread("prefill_seconds_range", 2),
    "tokens/s, lowest to highest": _spread("decode_tokens_per_second_range", 1),
    "KV cache held": _bytes("kv_bytes_stored"),
    "of it on the device": _bytes("kv_bytes_on_device"),
    "KV cache read a token": _bytes("kv_bytes_read_per_token"),
    "joules, prefill / a token": _joules,
}
"""Columns of the file alone; one without a value in any row is left out."""


def terminal_table(data: Mapping[str, Any]) -> Table:
    """The same rows for the terminal."""
    title = f"speed · {data['model']}"
    table = Table(*_head(data), title=title, caption=_caption(data), numbers_from=1)
    for cells in _cells(data):
        table.add_row(*cells)
    return table


def _caption(data: Mapping[str, Any]) -> str:
    alone, baseline = data["ranks"] == 1, data["baseline"]
    beside = f"the {baseline} model" if alone else f"{baseline} over the same {data['ranks']} ranks"
    parts = [
        f"× = faster than {beside} by this factor",
        "prefill: the time to the first token, but for one step",
        "read: share of keys read in prefill / decode",
        *(["found: right answers"] if _scored(data) else []),
        f"memory: {'the process' if alone else 'a rank'} at its peak, weights included",
        *([] if alone else ["sent: what a rank sends in prefill / per token"]),
        *([] if data["sessions"] == 1 else [f"measured in {data['sessions']} sessions, × within each"]),
    ]
    return " ".join([f"{'; '.join(parts)}.", *unfinished_note(data)])


def _scored(data: Mapping[str, Any]) -> bool:
    return any(row.get("score") is not None for row in data["overall"])


def _head(data: Mapping[str, Any]) -> list[str]:
    head = ["method", "length", "prefill s", "×", "tokens/s", "×", "read %"]
    head += ["found"] if _scored(data) else []
    return [*head, "memory", *(["sent"] if data["ranks"] > 1 else [])]


def _cells(data: Mapping[str, Any]) -> list[list[str]]:
    """The rows of both tables, under the columns of `_head`."""
    rows = []
    for row in data["overall"]:
        cells = [
            row["method"],
            str(row["length"]),
            number(row["prefill_seconds"], 2),
            number(row["prefill_speedup"], 2),
            number(row["decode_tokens_per_second"], 1),
            number(row["decode_speedup"], 2),
            "–" if row["decode_density"] is None else share_read(row).removesuffix(" %"),
        ]
        cells += [percent(row["score"], 0, " %")] if _scored(data) else []
        cells.append(_size(row["peak_memory_bytes"]))
        if data["ranks"] > 1:
            sent = (row["prefill_sent_bytes"], row["decode_sent_bytes_per_token"])
            cells.append(" / ".join(map(_size, sent)))
        rows.append(cells)
    return rows


def _size(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
