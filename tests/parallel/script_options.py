"""One rank of a job that runs several `farspan` commands, each rank with options of its own.

script_options.py FILE: FILE holds [[name, [argument, ...], rank 1's other arguments], ...] as JSON. Beside it
each rank writes RANK.json: {name: [exit code, stdout, stderr]}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from script_commands import run

if __name__ == "__main__":
    rank, file = os.environ["RANK"], Path(sys.argv[1])
    done = {}
    for name, arguments, others in json.loads(file.read_text()):
        done[name] = run(others if rank == "1" else arguments, "a prompt")
    file.with_name(f"{rank}.json").write_text(json.dumps(done))
