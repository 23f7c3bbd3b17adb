"""What fits on one device, by the length of the prompt and by how the cache is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...attention.errors import FarspanError
from .cost import decode_reads, decode_seconds, elsewhere, memory
from .job import Job
from .storages import HOST, PLAIN, STORAGES


@dataclass(frozen=True)
class Fit:
    """One cell of the table. needed: bytes of the device. elsewhere: bytes in the lower tier. seconds: of one
    token at decode."""

    storage: str
    length: int
    needed: int
    elsewhere: int
    fits: bool
    seconds: float


def what_fits(job: Job, lengths: Sequence[int]) -> list[Fit]:
    """Each storage at each length on the one device of a job. A device whose own memory is that of the host
    has no host tier, and a method that evicts drops single keys, which only the plain storage can."""
    if job.gpus != 1:
        raise FarspanError(f"Storages are compared on one device; this plan has {job.gpus}.")
    found = []
    for stored in STORAGES.values():
        if stored.tier == HOST and job.device.host_bandwidth is None:
            continue
        if stored != PLAIN and job.decode.evict:
            continue
        for length in lengths:
            one = replace(job, length=length, storage=stored)
            needed = sum(memory(one)[0].values())
            seconds = decode_seconds(one, *decode_reads(one))
            fits = needed <= job.memory
            found.append(Fit(stored.name, length, needed, elsewhere(one), fits, seconds))
    return found
