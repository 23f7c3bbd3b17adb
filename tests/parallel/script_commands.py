"""Several `farspan` commands, one after another, on each rank of a job.

torchrun script_commands.py FILE: FILE holds [[name, [argument, ...], rank 0's stdin], ...] as JSON. Beside
it each rank writes RANK.json: {name: [exit code, stdout, stderr]}.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from farspan.cli import main


def run(arguments: list[str], stdin: str) -> tuple[int, str, str]:
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    code = 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    rank, file = os.environ["RANK"], Path(sys.argv[1])
    done = {}
    for name, arguments, stdin in json.loads(file.read_text()):
        done[name] = run(arguments, stdin if rank == "0" else "a rank other than 0 has read stdin")
    file.with_name(f"{rank}.json").write_text(json.dumps(done))
