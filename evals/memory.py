"""How many prompts fit in one batch: the cache, its copies, and the widest activations of a prefill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

MOST = 10
"""Rows beyond this gain little on a CPU (the weights are read once for them all) and delay the next line
written."""
COPIES = 4
"""Caches alive at once: the shared prefill, the copy in use, and that copy's buffer growing to twice its
size."""


def batch_rows(model: Any, length: int, count: int) -> int:
    """Rows per batch for `count` prompts of `length` tokens, evened out over the batches."""
    per_row = COPIES * kv_bytes(model, length) + activation_bytes(model, length)
    fitting = max(1, min(MOST, int(available_memory(model.device) / 2 / max(per_row, 1))))
    batches = -(-max(count, 1) // fitting)
    return -(-max(count, 1) // batches)


def kv_bytes(model: Any, length: int) -> int:
    """Bytes of the dense KV cache of one row (every layer counted as full attention)."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim * length * _itemsize(model)


def activation_bytes(model: Any, length: int) -> int:
    """A bound on what one row's prefill holds beside the cache: a layer's MLP and a few hidden states."""
    config = model.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return length * (3 * wide + 8 * config.hidden_size) * max(_itemsize(model), 4)


def available_memory(device: torch.device) -> int:
    """Free bytes on the device; on the CPU within the container's limit where there is one."""
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


def _itemsize(model: Any) -> int:
    return int(torch.empty((), dtype=model.dtype).element_size())
