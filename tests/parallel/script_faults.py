"""What a rank of tests/parallel/test_faults.py runs: a few collectives, then a fault on the rank given.

    python script_faults.py FAULT RANK

Standard output gets the time of the fault and of the end of those who were waiting, in the machine's
monotonic seconds.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from farspan.attention.errors import FarspanError
from farspan.parallel.group.config import ContextParallel
from farspan.parallel.group.join import join
from farspan.parallel.group.mesh import Mesh

TIMEOUT = 3.0


def now(what: str) -> None:
    print(what, time.monotonic(), flush=True)


def fault(kind: str, mesh: Mesh) -> None:
    now("fault")
    match kind:
        case "exit" | "beside":
            os._exit(1)
        case "first try":
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os._exit(1)
        case "kill" | "stop" | "terminate":
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM}[kind]
            os.kill(os.getpid(), number)
        case "late":
            time.sleep(3 * TIMEOUT)
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        case "cpu memory":
            torch.empty(1 << 50)
        case "error":
            raise KeyError("layer 7")
        case "input":
            raise FarspanError("A prompt must not be empty.")
        case "leave":
            raise SystemExit(5)  # past what catches a failing model call
        case "inputs":
            mesh.agree({"input_ids": torch.tensor([1, 2]), "max_new_tokens": 8})


def main(kind: str, rank: int) -> None:
    beside = None
    given = ContextParallel(timeout=TIMEOUT)
    if kind == "beside":  # other ranks have other shares of the weights
        dist.init_process_group("gloo")
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
        given, beside = dataclasses.replace(given, mesh=both), both.get_group("tp")
    mesh = join(given, "cpu")
    assert mesh is not None
    try:
        for step in range(4):
            gathered = mesh.ranks.all_gather(torch.full((100,), step))
            assert gathered.unique().tolist() == [step]
        if dist.get_rank() == rank:
            fault(kind, mesh)
        if kind == "inputs":
            mesh.agree({"input_ids": torch.tensor([1, 3]), "max_new_tokens": 8})
        if beside is not None:
            dist.all_reduce(torch.zeros(100), group=beside)
        for _ in range(4):
            mesh.ranks.all_gather(torch.zeros(100))
    except Exception as error:
        raise mesh.watch.failing(error) from error
    mesh.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except FarspanError as error:
        print(f"farspan: {error}", file=sys.stderr, flush=True)
        now("end")
        sys.exit(2)
