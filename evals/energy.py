"""Energy of a block of code, where the device counts it: NVML on NVIDIA GPUs, RAPL on CPUs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


class Energy:
    """Joules, known at the end of the block; None where the device does not count them."""

    joules: float | None = None


@contextmanager
def energy(device: torch.device) -> Iterator[Energy]:
    """The energy that the device used in a `with` block, other processes on it included.

    On CUDA it is that of the GPU (the package `nvidia-ml-py` reads it), on a CPU that of all its packages
    (only root may read it on most systems).
    """
    found = Energy()
    counter = _gpu(device) if device.type == "cuda" else _cpu()
    before = None if counter is None else counter()
    yield found
    if counter is None or before is None:
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    after = counter()
    if after is not None and after >= before:  # a counter that began anew in between says nothing
        found.joules = after - before


def _gpu(device: torch.device) -> Callable[[], float | None] | None:
    """A function that returns the joules of a GPU since its driver was loaded."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no package, no driver, or a GPU without a counter
        return None
    return lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # millijoules


def _cpu() -> Callable[[], float | None] | None:
    """A function that returns the joules of all CPU packages since some time."""
    counters = sorted(RAPL.glob("intel-rapl:[0-9]/energy_uj"))
    if not counters:
        return None

    def joules() -> float | None:
        try:
            return sum(int(counter.read_text()) for counter in counters) / 1e6
        except (OSError, ValueError):
            return None

    return joules
