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
import traceback
from collections.abc import Callable
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
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.stop()
                raise TimeoutError(f"rank {rank} of {size} has not answered in {timeout} s")
            good, result = pipe.recv()
            (results if good else errors).append(result if good else f"rank {rank}: {result}")
        if errors:
            self.stop()  # a group that has failed is of no more use
            raise AssertionError("\n".join(errors))
        return results[:size]

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
