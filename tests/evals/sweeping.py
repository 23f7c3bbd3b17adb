"""`python sweeping.py WHAT OUT CONFIG`: sweeps of a tiny model in forked processes, for test_sweep.py.

WHAT is `whole` (one process), `killed` (kill -9 at random moments, then to the end) or `pair` (two processes
at once). Forks share the imports, so that a process takes a second rather than ten. It prints one JSON
object.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILLS = int(os.environ.get("FARSPAN_TEST_KILLS", "6"))


def load_tiny() -> Any:
    spec = importlib.util.spec_from_file_location("farspan_tests_tiny", Path(__file__).with_name("tiny.py"))
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny


def forked(work: Callable[[], None]) -> int:
    """The id of a child process that does the work and exits."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(what: str, out: Path, config: Path) -> None:
    import torch

    from farspan.evals.asked import Asked
    from farspan.evals.sweep.config import read
    from farspan.evals.sweep.work import sweep

    torch.set_num_threads(1)
    tiny = load_tiny()

    def draw(asked: Asked, tokenizer: Any, cell: Any, count: int | None = None) -> Any:
        numbers = range(asked.samples if count is None else count)
        return (tiny.sample(cell.task, i, length=cell.length) for i in numbers)

    Asked.draw = draw  # type: ignore[method-assign]  # prompts of a hundred characters and twelve new ones
    model, plan = tiny.tiny_model(), read(config, out)

    def work(name: str) -> None:
        with (out.parent / f"{out.name}-{name}.log").open("a", buffering=1) as log:
            sweep(plan, lambda grid: (model, tiny.CharTokenizer()), lambda line: print(line, file=log))

    begun = time.monotonic()
    if what == "pair":
        children = [forked(lambda name=name: work(name)) for name in "ab"]
        codes = [os.waitpid(child, 0)[1] for child in children]
        print(json.dumps({"codes": codes}))
        return
    kills, rng = 0, random.Random(0)
    span = float(os.environ.get("FARSPAN_TEST_SPAN", "1"))
    while what == "killed" and kills < KILLS:
        child = forked(lambda: work("killed"))
        time.sleep(rng.uniform(0.02, span))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if kills < KILLS and not (out / "ruler-tiny" / "summary.json").exists():
            continue
        break
    _, code = os.waitpid(forked(lambda: work("last")), 0)
    print(json.dumps({"codes": [code], "kills": kills, "seconds": time.monotonic() - begun}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
