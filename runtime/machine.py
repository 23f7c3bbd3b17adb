"""The machine that times were taken on: what a figure of speed belongs to."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor as the system calls it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads torch gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} ({torch.get_num_threads()} threads)"
