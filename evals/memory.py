"""How many prompts fit in one batch: the cache, its copies, and the widest activations of a prefill."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .ranks import Job

MOST = 10
"""The most rows of a batch. More gain little on a CPU, and results are written less often."""
COPIES = 4
"""Caches that exist at once: the shared prefill, the copy in use, and that copy's buffer while it grows."""


class Peak:
    """Bytes, known at the end of the block; None where the system does not report them."""

    bytes: int | None = None


def batch_rows(model: Any, length: int, count: int, job: Job | None = None) -> int:
    """Rows per batch for `count` prompts of `length` tokens, about the same in each batch.

    Over the ranks of a job the rank with the least memory decides.
    """
    per_row = COPIES * kv_bytes(model, length) + activation_bytes(model, length)
    free = available_memory(model.device)
    if job is not None and job.mesh is not None:
        per_row /= job.size  # a prompt is spread over the ranks
        if model.device.type == "cpu":  # ranks of one machine share its memory
            free //= int(os.environ.get("LOCAL_WORLD_SIZE", job.size))
        free = min(job.gather(free))
    fitting = max(1, min(MOST, int(free / 2 / max(per_row, 1))))
    batches = -(-max(count, 1) // fitting)
    return -(-max(count, 1) // batches)


def kv_bytes(model: Any, length: int) -> int:
    """Bytes of the dense KV cache of one row; every layer is counted as full attention."""
    channels = 0
    for config in _layers(model):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        channels += heads * dim
    return 2 * channels * length * _itemsize(model)


def activation_bytes(model: Any, length: int) -> int:
    """An upper bound, in bytes, of a row's activations in prefill: a layer's MLP and a few hidden states."""
    hidden = model.config.get_text_config().hidden_size
    given = [getattr(config, "intermediate_size", None) for config in _layers(model)]
    wide = max(max(x) if isinstance(x, list | tuple) else x or 4 * hidden for x in given)
    return length * (3 * wide + 8 * hidden) * max(_itemsize(model), 4)


def _layers(model: Any) -> list[Any]:
    """The config of each layer. In some models (Gemma 4) settings differ between layers."""
    config = model.config.get_text_config()
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def available_memory(device: torch.device) -> int:
    """Free bytes on the device. On the CPU a container's limit counts, if there is one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 2 << 30  # unknown (no such sysconf): assume a small machine
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return int(free)
    return int(min(free, max(limit - used, 0)))


@contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """The peak memory of this process on the device in a `with` block, weights included."""
    found = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.bytes = int(torch.cuda.max_memory_allocated(device))
        return
    proc = Path("/proc/self")
    try:
        (proc / "clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:  # not Linux, or not allowed
        yield found
        return
    yield found
    [line] = [line for line in (proc / "status").read_text().splitlines() if line.startswith("VmHWM")]
    found.bytes = int(line.split()[1]) * 1024


def _itemsize(model: Any) -> int:
    return int(torch.empty((), dtype=model.dtype).element_size())
