"""Result folders made by hand, for the tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from farspan.evals.settings import versions


def row(method: str, task: str, index: int, score: float, **changes: Any) -> dict[str, Any]:
    """A row of a ruler folder. Sparse methods read a quarter of the keys in decode."""
    length = changes.get("length", 4096)
    share = 1.0 if method == "dense" else 0.25
    return {
        "key": f"ruler/{task}/{length}/{index}",
        "method": method,
        "recipe": {"index": index},
        "suite": "ruler",
        "task": task,
        "length": length,
        "index": index,
        "extra": {},
        "score": score,
        "nll": 1.0 - score / 10,
        "gold_tokens": 5,
        "density": {"prefill": 1.0, "decode": share},
        "kv_read": share,
        "seconds": {"prefill": 1.0, "decode": 1.0},
        "batch": 1,
        "steps": 5,
        "fallbacks": {},
        "answer": f"{method} says {score}",
        "question": f"What is number {index}?",
        "references": ["42"],
    } | changes


def write(folder: Path, rows: Sequence[Mapping[str, Any]], **changes: Any) -> Path:
    """A folder with these rows, whose config.json has the changes."""
    folder.mkdir(parents=True, exist_ok=True)
    methods = list(dict.fromkeys(line["method"] for line in rows))
    lengths = list(dict.fromkeys(line["length"] for line in rows))
    config = {"format": 1, "suite": "ruler", "model": "tiny", "dtype": "float32", "identity": None, "seed": 1}
    config |= {"methods": methods, "lengths": lengths, "recipes": {}, "planned": {}, "versions": versions()}
    config |= {"sessions": [{"cpu": "a CPU", "threads": 2}], "haystack": "sotu"} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    return folder


def speed_row(method: str, length: int, prefill: float, tokens: float) -> dict[str, Any]:
    return {
        "key": f"speed/{length}/0",
        "method": method,
        "recipe": {},
        "length": length,
        "prefill_seconds": prefill,
        "decode_tokens_per_second": tokens,
        "session": 1,
        "prefill_density": None if method == "unpatched" else 0.5,
        "decode_density": None if method == "unpatched" else 0.1,
    }


SPEED = {
    "suite": "speed",
    "baseline": "unpatched",
    "new_tokens": 10,
    "batch_size": 1,
    "ranks": 1,
    "repeats": 1,
}
