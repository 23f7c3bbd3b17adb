"""This machine: the names of its processor and GPU, which are recorded with every measured time, and what
its memory and arithmetic reach."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ..parallel.planner.device import Device

_BYTES = 1 << 28  # of the buffers that are copied
_SIDE = 2048  # of the matrices that are multiplied


def cpu_name() -> str:
    """The name of the processor, from the operating system."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or the name of the processor with the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} ({torch.get_num_threads()} threads)"


def measured() -> Device:
    """The GPU of this machine, or its processor where there is none, with figures that are measured in about
    a second: memory is read at the speed of a large copy (bytes read plus written), and products reach what
    one of two matrices in bfloat16 does, or in float32 where that is faster."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here, there = (torch.ones(_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    host = None
    if device.type == "cuda":
        pinned = torch.ones(_BYTES, dtype=torch.uint8, pin_memory=True)
        host = _BYTES / _least_seconds(lambda: here.copy_(pinned, non_blocking=True))
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bandwidth = 2 * _BYTES / _least_seconds(lambda: there.copy_(here))
    products = []
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
        products.append(_least_seconds(lambda x=x: x @ x))  # type: ignore[misc]
    return Device(
        name=device_name(device),
        flops=2 * _SIDE**3 / min(products),
        bandwidth=bandwidth,
        memory=memory,
        link_bandwidth=bandwidth,
        node_bandwidth=bandwidth,
        utilisation=1.0,
        per_node=1,
        host_bandwidth=host,
    )


def _least_seconds(run: Callable[[], object]) -> float:
    """The least seconds of three runs after a first one."""
    taken = []
    for _ in range(4):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
