"""What a device can do at best, measured, and how one run on it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .record import clock, host_seconds, interleaved

_FLUSH = 2 << 30  # bytes: far more than any L2, and long enough to read for the host to queue the run


class TooMuch(Exception):
    """A run that would take longer, or more memory, than was allowed; its text says how much."""


class Timer:
    """Seconds of one run. On CUDA between two events: what the host needs to queue the run is hidden behind
    a long read before the first event, waits for the device inside the run are not. The read fills the L2
    cache with other data that need not be written back, so that the run pays for no earlier write. On the
    CPU by the host's clock; its caches are left as the run before left them."""

    def __init__(self, device: str) -> None:
        self._other = torch.zeros(_FLUSH // 4, device=device) if device == "cuda" else None

    def __call__(self, run: Callable[[], Any]) -> float:
        if self._other is None:
            return host_seconds(run)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.sum()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def queueing(self, run: Callable[[], Any], repeats: int = 5) -> float | None:
        """Median seconds that the host needs to queue a run which has been compiled; None on the CPU. A user
        waits for the larger of this and the device's time."""
        taken = []
        for _ in range(repeats if self._other is not None else 0):
            begin = clock()
            run()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken) if taken else None


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates measured at the start of the run, and what one call may cost.

    bandwidth: bytes a second, read plus written, of a large copy.
    rate:      floating-point operations a second of a large matrix product of the run's dtype.
    """

    device: str
    bandwidth: float
    rate: float
    seconds_limit: float
    timer: Timer = field(repr=False)

    def seconds(self, flops: float, bytes: float) -> float:
        """No run that does so much is faster."""
        return max(flops / self.rate, bytes / self.bandwidth)

    def check(self, *, flops: float = 0, bytes: float = 0, memory: float = 0) -> None:
        """Raise TooMuch for a call that takes longer than the limit at the ceiling's rate, or more memory
        than is free."""
        if (least := self.seconds(flops, bytes)) > self.seconds_limit:
            raise TooMuch(
                f"at least {least:.0f} s a call by the measured rates, over --seconds-limit "
                f"{self.seconds_limit:g}"
            )
        if memory > 0.9 * (free := _free_memory(self.device)):
            raise TooMuch(f"{memory / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")


def measure(device: str, dtype: torch.dtype, seconds_limit: float, repeats: int = 7) -> Ceilings:
    """The ceilings of ``device``, on random data (zeros can run faster)."""
    timer, on_gpu = Timer(device), device == "cuda"
    n = 8192 if on_gpu else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.randn((1 << 29) if on_gpu else (1 << 26), device=device)  # 2 GiB; 256 MiB
    target = torch.empty_like(source)
    runs: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.matmul(a, b),
    }
    taken = interleaved(runs, repeats, seconds=timer)
    return Ceilings(
        device=device,
        bandwidth=2 * source.nbytes / taken["copy"],
        rate=2 * n**3 / taken["product"],
        seconds_limit=seconds_limit,
        timer=timer,
    )


def _free_memory(device: str) -> float:
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch, for reuse
        return torch.cuda.mem_get_info()[0] + kept
    info = Path("/proc/meminfo")
    if not info.exists():
        return float("inf")
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return 1024 * float(lines["MemAvailable"].split()[0])
