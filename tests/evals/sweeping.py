"""`python sweeping.py FOLDER CONFIG`: the same sweep of a tiny model three times, for test_sweep.py.

Into FOLDER/whole by one process, into FOLDER/killed with kill -9 at random moments, into FOLDER/pair by two
processes at once. Forks share the imports, so that a process takes a second rather than ten. It prints how
often a process was killed, and how many finished rows each of them left.
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


def main(base: Path, config: Path) -> None:
    import torch

    from farspan.evals.ruler import Ruler
    from farspan.evals.sweep.config import read
    from farspan.evals.sweep.work import sweep

    torch.set_num_threads(1)
    tiny = load_tiny()

    def draw(task: Ruler, tokenizer: Any, cell: Any) -> Any:
        return (tiny.sample(cell.task, i, length=cell.length) for i in range(task.samples))

    Ruler.of_cell = draw  # type: ignore[method-assign]  # prompts of a hundred characters and twelve new ones
    model = tiny.tiny_model()

    def work(out: Path, name: str) -> None:
        with (base / f"{name}.log").open("a", buffering=1) as log:
            plan = read(config, out)
            sweep(plan, lambda grid: (model, tiny.CharTokenizer()), lambda line: print(line, file=log))

    begun = time.monotonic()
    assert ended(forked(lambda: work(base / "whole", "whole"))) == 0
    span = time.monotonic() - begun
    rng, left = random.Random(0), []
    while len(left) < KILLS:
        child = forked(lambda: work(base / "killed", "killed"))
        time.sleep(rng.uniform(0.02, span / 6))
        os.kill(child, signal.SIGKILL)
        if not os.WIFSIGNALED(ended(child)):
            break  # it was done before
        files = (base / "killed").rglob("samples.jsonl")  # a row may stand in the working folder, too
        left.append(len({line for file in files for line in file.read_bytes().split(b"\n")[:-1]}))
    assert ended(forked(lambda: work(base / "killed", "last"))) == 0
    pair = [forked(lambda name=name: work(base / "pair", f"pair-{name}")) for name in "ab"]
    assert [ended(child) for child in pair] == [0, 0]
    print(json.dumps({"left": left, "seconds": span}))


def ended(child: int) -> int:
    """How a process ended, as os.waitpid says it."""
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
