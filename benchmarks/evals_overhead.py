"""The seconds of an evaluation that are not the model's own, by part.

    python -m benchmarks.evals_overhead [--model smollm2-135m] [--length 4096] [--samples 2]

Runs RULER into a new folder, as `farspan eval ruler` does, and counts everything from the loaded model to the
written tables. "model" is the time within the model's forward calls, the method's own work included.
"overhead" is all else, as a share of the whole. A part's seconds are those outside of the parts that it
calls. The clock counts, because the model's time is waited for by the clock, too.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from farspan.evals import batch, report, results, run, shared, task
from farspan.evals.ruler import Ruler
from farspan.evals.setup import Setup
from farspan.evals.shared import Started
from farspan.runtime.models import load

from .record import save, specs_of, table

OTHER = "everything else"
PARTS: dict[str, list[tuple[Any, str]]] = {
    "identity of the model": [(shared, "identify")],
    "prompts": [(Ruler, "draw")],
    "tokens": [(run, "encode"), (run, "encode_gold")],
    "patching": [(shared, "patched_with"), (shared, "patch")],
    "copies of caches": [(Started, "copy")],
    "generate": [(batch, "generate_by")],
    "score": [(task.Task, "score"), (run, "row_of")],
    "rows and settings": [(results.Results, "append"), (results.Results, "_write_json")],
    "summary": [(run, "summarise")],
    "tables and pictures": [(report, "write")],
}
"""The functions of each part, as the module or class that they are looked up in, and their names."""


class Parts:
    """Seconds by part; a part that is called within another one stops the other's clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running = [OTHER]
        self._since = time.perf_counter()

    def switch(self) -> None:
        """Give the seconds since the last switch to the part that was running."""
        now = time.perf_counter()
        self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now

    def call(self, part: str, function: Callable[[], Any]) -> Any:
        self.switch()
        self._running.append(part)
        try:
            return function()
        finally:
            self.switch()
            self._running.pop()

    def counted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its seconds counted; of a generator, those of its steps."""

        @functools.wraps(function)
        def wrapped(*args: Any, **given: Any) -> Any:
            made = self.call(part, lambda: function(*args, **given))
            return self.stepped(part, made) if isinstance(made, Iterator) else made

        return wrapped

    def stepped(self, part: str, items: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while (item := self.call(part, lambda: next(items, end))) is not end:
            yield item


def measured(model: Any, tokenizer: Any, asked: Ruler, specs: list[str], batch_size: int) -> dict[str, float]:
    """Seconds of each part of one evaluation into a new folder."""
    parts = Parts()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as wrapped:
        for part, functions in PARTS.items():
            for owner, name in functions:
                counted = parts.counted(part, getattr(owner, name))
                wrapped.enter_context(mock.patch.object(owner, name, counted))
        wrapped.enter_context(mock.patch.object(model, "forward", parts.counted("model", model.forward)))
        parts.switch()
        parts.seconds.clear()
        chosen, config = task.settings(asked, tokenizer)
        setup = Setup(
            model=model,
            tokenizer=chosen,
            methods=specs,
            out=Path(folder),
            name="overhead",
            config=config,
            progress=False,
        )
        summary = asked.run(setup, asked.draw(chosen), batch_size=batch_size)
        parts.switch()
    assert summary.complete
    return parts.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tasks", default="niah_single_2,niah_multikey_2,fwe")
    parser.add_argument("--methods", default="dense; quest:k=512")
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    asked = Ruler(lengths=[args.length], tasks=args.tasks.split(","), samples=args.samples)
    seconds = measured(model, tokenizer, asked, specs_of(args.methods), args.batch_size)
    whole = sum(seconds.values())
    rows = [
        {"part": part, "s": spent, "share of the whole": spent / whole}
        for part, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    rows.append(
        {
            "part": "overhead",
            "s": whole - seconds["model"],
            "share of the whole": 1 - seconds["model"] / whole,
        }
    )
    print(table(rows))
    print("written to", save("evals_overhead", rows, arguments={"device": str(model.device), **vars(args)}))


if __name__ == "__main__":
    main()
