"""Read the bytes of config.json and samples.jsonl, and name what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..attention.errors import FarspanError
from .settings import CONFIG, EMPTY
from .shape import Shape, fill, misfit

ROW: dict[str, Any] = {"key": str, "method": str, "recipe": dict}
"""The fields that every row has. A key is `CELL/NUMBER`: the sample's number in its cell."""


class ResultsError(FarspanError):
    """A folder of results cannot be used: another configuration's, damaged, read-only, full, or in use."""


def parse(data: bytes) -> Any:
    """The JSON value; None where the bytes are not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def parse_config(data: bytes, path: Path) -> dict[str, Any]:
    """The settings of a folder. path: the file, for the error.

    Raises ResultsError for bytes that are not the config.json of an evaluation.
    """
    found = parse(data)
    if not isinstance(found, dict) or "format" not in found:
        raise ResultsError(
            f"{path} is not the config of a farspan evaluation; give an empty or new --out folder."
        )
    if wrong := misfit(EMPTY | found, CONFIG, "it"):
        raise ResultsError(f"{path} is damaged ({wrong}); mend it, or give another --out.")
    return found


def parse_rows(data: bytes, path: Path, shape: Shape = ROW) -> tuple[list[dict[str, Any]], int]:
    """The rows of a samples.jsonl and the number of bytes that they take.

    An incomplete last line, as a session that is killed while it writes leaves it, is not counted. path: the
    file, for the error. Raises ResultsError for any other line that does not have the shape.
    """
    rows: list[dict[str, Any]] = []
    start = 0
    while start < len(data):
        end = data.find(b"\n", start)
        row = parse(data[start : end if end >= 0 else len(data)])
        if end < 0 or (row is None and end == len(data) - 1):
            break
        wrong = "it is not JSON" if row is None else misfit(row, shape, "it")
        if wrong:
            number = data.count(b"\n", 0, start) + 1
            raise ResultsError(
                f"line {number} of {path} is damaged ({wrong}); delete that line to have it computed again."
            )
        fill(row, shape)
        rows.append(row)
        start = end + 1
    return rows, start
