"""A job that goes well: all ranks of whatever launcher started this gather their numbers and agree.

    LAUNCHER script_gather.py [accelerate]

Each rank prints one line: its rank, the ranks it heard from, the size.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from farspan.parallel.group.join import join


def main(how: str) -> None:
    given: Any = "auto"
    if how == "accelerate":
        from accelerate import Accelerator

        Accelerator(cpu=True)  # initialises torch.distributed, as a user's script does before it patches
    mesh = join(given, "cpu")
    assert mesh is not None
    heard = mesh.ranks.all_gather(torch.tensor([mesh.rank])).flatten().tolist()
    mesh.agree({"heard": torch.tensor(heard)})
    print(f"rank {mesh.rank} heard {heard} of {mesh.size}", flush=True)
    mesh.close()


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] and not sys.argv[1].startswith("--") else "auto")
