"""Real processes for the tests: one pool of them per pytest worker, talking gloo over the loopback.

    world.run(jobs.function, 3, *arguments)   -> [result of rank 0, of rank 1, of rank 2]

calls ``function(group, *arguments)`` on three of them with a process group of their own. Functions are found
by their file and name, so they stand at the top of a module; arguments and results are pickled.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing as mp
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MOST = 4


class World:
    """MOST processes, started when first asked for and kept."""

    def __init__(self) -> None:
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def run(
        self, function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 300
    ) -> list[Any]:
        """What ``function(group, *arguments)`` returns on each of ``size`` ranks. Any rank's exception
        fails, with its traceback."""
        if not self._processes:
            self._start()
        name = ".".join(Path(inspect.getfile(function)).relative_to(ROOT).with_suffix("").parts)
        for pipe in self._pipes:
            pipe.send((name, function.__qualname__, size, arguments))
        results: dict[int, Any] = {}
        errors: list[str] = []
        until = time.monotonic() + timeout
        while len(results) < MOST and time.monotonic() < until:
            for pipe in wait([p for i, p in enumerate(self._pipes) if i not in results], timeout=1):
                rank = self._pipes.index(pipe)
                good, results[rank] = pipe.recv()
                if not good:
                    errors.append(f"rank {rank}: {results[rank]}")
                    until = min(until, time.monotonic() + 2)  # the others may be waiting for it for ever
        if errors or len(results) < MOST:
            self.stop()  # a group that has failed is of no more use
            missing = sorted(set(range(MOST)) - set(results))
            raise AssertionError("\n".join([*errors, f"ranks {missing} have not answered"]))
        return [results[rank] for rank in range(size)]

    def _start(self) -> None:
        import torch.distributed as dist

        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "transformers", "farspan.runtime.patch"])
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._store = store
        sys.path.append(str(ROOT))  # children take the path along, and so find this module by its name
        for rank in range(MOST):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store.port, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        sys.path.remove(str(ROOT))

    def stop(self) -> None:
        """End the processes; the next run starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._pipes, self._processes = [], []


def _serve(rank: int, port: int, pipe: Any) -> None:
    """A process of the pool: one job after another until it is killed."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.TCPStore("127.0.0.1", port, is_master=False), rank=rank, world_size=MOST
    )
    groups: dict[int, Any] = {}
    while True:
        name, function, size, arguments = pipe.recv()
        try:
            if size not in groups:  # every process takes part in making it
                groups[size] = dist.new_group(list(range(size)))
            result = None
            if rank < size:
                result = getattr(importlib.import_module(name), function)(groups[size], *arguments)
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
