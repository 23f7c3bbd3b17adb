"""The `farspan` command in which a rank kills itself: rank 0 in the first attempt, rank 1 in the second.

torchrun --max-restarts 2 script_dying.py OUT COUNT ARGUMENTS...: it dies when OUT/samples.jsonl has COUNT
lines more than at the start of the attempt, and leaves a copy of them in OUT.ATTEMPT.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from farspan.cli import main


def die_after(count: int, out: Path, attempt: str) -> None:
    def rows() -> int:
        return results.read_bytes().count(b"\n") if results.exists() else 0

    results = out / "samples.jsonl"
    until = rows() + count
    while rows() < until:
        time.sleep(0.002)
    out.with_name(f"{out.name}.{attempt}").write_bytes(results.read_bytes())
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    out, count, *arguments = sys.argv[1:]
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if attempt == os.environ["RANK"]:
        dying = (int(count), Path(out), attempt)
        threading.Thread(target=die_after, args=dying, daemon=True).start()
    main(arguments)
