"""What benchmarks share: reading a list of specs, timing runs in turn, and what is written down of a run: the
machine, the versions, the numbers."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from farspan.evals.stats import paired_interval
from farspan.runtime.machine import cpu_name

HERE = Path(__file__).parent
RESULTS = Path(os.environ.get("FARSPAN_RESULTS", HERE / "results"))
K, T = TypeVar("K"), TypeVar("T")


def machine(device: str = "cuda") -> dict[str, Any]:
    """Processor, threads, versions and commit of this run; device: where it ran, if there is a choice."""
    import transformers

    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device != "cpu" and torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": next(iter(d.version for d in metadata.distributions(name="triton")), None),
        "transformers": transformers.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit(checkout: Path = HERE) -> str:
    """The commit of a checkout; "" where there is no git."""
    if shutil.which("git") is None:
        return ""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, cwd=checkout).stdout.strip()


def save(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Write <name>.json to the folder that FARSPAN_RESULTS names, or to results/ here."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    device = about.get("arguments", {}).get("device", "cuda")
    path.write_text(json.dumps({"machine": machine(device), **about, "rows": rows}, indent=1) + "\n")
    return path


def specs_of(text: str) -> list[str]:
    """The specs of an option such as "dense; quest:k=512"."""
    return [spec.strip() for spec in text.split(";") if spec.strip()]


def mean_difference(differences: Sequence[float]) -> dict[str, float]:
    """Two columns: the mean of paired differences of NLL, and the half width of its 95 % interval (NaN where
    there is none)."""
    off = paired_interval(differences)
    assert off is not None
    return {"ΔNLL": off.mean, "±": off.high - off.mean if off.high is not None else float("nan")}


def clock() -> float:
    """Seconds, after the device's queue is empty."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stamps:
    """A streamer for `generate` that notes when it is given tokens: the prompt first, then each new one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Any) -> None:
        self.times.append(clock())

    def end(self) -> None:
        """Nothing more comes."""


def host_seconds(run: Callable[[], Any]) -> float:
    """Seconds of one run on the host's clock, until the device's queue is empty again."""
    begin = clock()
    run()
    return clock() - begin


def in_turn(runs: Mapping[K, Callable[[], T]], repeats: int, *, warm_up: int = 1) -> dict[K, list[T]]:
    """What each run returned, ``repeats`` times; ``warm_up`` rounds before are left out. The runs are called
    in turn, so that drift of the machine hits all alike."""
    rounds = [{name: run() for name, run in runs.items()} for _ in range(warm_up + repeats)]
    return {name: [taken[name] for taken in rounds[warm_up:]] for name in runs}


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    seconds: Callable[[Callable[[], Any]], float] = host_seconds,
    warm_up: int = 1,
) -> dict[str, float]:
    """Median seconds of each run, in turn (``in_turn``). ``seconds`` times one run."""
    timed = {name: partial(seconds, run) for name, run in runs.items()}
    return {
        name: statistics.median(taken) for name, taken in in_turn(timed, repeats, warm_up=warm_up).items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    heads = list(rows[0])
    cells = [[f"{row[h]:.4g}" if isinstance(row[h], float) else str(row[h]) for h in heads] for row in rows]
    widths = [max(len(h), *(len(row[i]) for row in cells)) for i, h in enumerate(heads)]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *cells]
    ]
    return "\n".join(lines)
