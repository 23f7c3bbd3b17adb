"""The names of this machine's processor and GPU, which are recorded with every measured time."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch


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
