"""Loading a saved prefix against reading it again, in one run.

    python -m benchmarks.prefixes [--model smollm2-135m] [--tokens 16384] [--methods "dense; quest:k=1024"]

The prefill of random tokens is timed once for each method, then the save, and the load ``--repeats`` times:
from files that the system has in memory, and from files that were dropped from it (cold). A load takes all
that ``farspan.load_cache`` does, the comparison of model and method included. The logits of a question of
five tokens after the load must be those after the prefill, bit for bit.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import farspan
from farspan.runtime import hf

from .record import clock, save, specs_of, table


def forget(folder: Path) -> None:
    """Drop the files of a folder from the system's memory."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def answer(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The logits of the last tokens of ids [1, N], of which the cache holds the first."""
    question = ids[:, cache.get_seq_length() :]
    logits: torch.Tensor = model(question, use_cache=True, **hf.with_cache(model, cache)).logits
    return logits


def measure(model: Any, ids: torch.Tensor, spec: str, folder: Path, repeats: int) -> dict[str, Any]:
    """A row of the table."""
    prompt = ids[:, :-5]
    with farspan.patch(model, spec):
        began = clock()
        cache = hf.fill(model, prompt, torch.ones_like(prompt))
        prefill = clock() - began
        began = clock()
        farspan.save_cache(model, cache, prompt, folder)
        saving = clock() - began
        seconds: dict[str, list[float]] = {"load": [], "cold": []}
        for _ in range(repeats):
            for name, taken in seconds.items():
                if name == "cold":
                    forget(folder)
                began = clock()
                loaded = farspan.load_cache(model, folder)
                taken.append(clock() - began)
        began = clock()
        got = answer(model, ids, loaded.inputs(ids, keep=False)[hf.cache_name(model)])
        first = clock() - began
        want = answer(model, ids, copy.deepcopy(cache))
    load, cold = (statistics.median(taken) for taken in seconds.values())
    return {
        "method": spec,
        "tokens": prompt.shape[1],
        "MB": sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
        "prefill s": prefill,
        "save s": saving,
        "load s": load,
        "cold load s": cold,
        "answer s": first,
        "times faster": prefill / load,
        "times faster, cold": prefill / cold,
        "same logits": bool(torch.equal(got, want)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--methods", default="dense; quest:k=1024; recycled:k=1024,stride=10")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, _ = farspan.load(args.model)
    ids = torch.randint(3, model.config.vocab_size, (1, args.tokens + 5))
    rows = []
    for spec in specs_of(args.methods):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(model, ids, spec, Path(folder), args.repeats))
        print(table(rows[-1:]), flush=True)
    print("written to", save("prefixes", rows, arguments=vars(args)))


if __name__ == "__main__":
    main()
