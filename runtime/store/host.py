"""Keys and values in host memory, for queries on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bridges import Fetching, copy_heads
from .hot_rows import HotRows, check_cached
from .memory import Memory


@dataclass(frozen=True, kw_only=True)
class Host(Memory):
    """Pinned host memory, where there is a GPU. Rows that a method selects are copied to the GPU, all rows
    for a dense one, a block at a time.

    cached: rows for each KV head that stay on the GPU, those that were used last.
    """

    tier: ClassVar[str] = "host"
    prefetches: ClassVar[bool] = True
    cached: int = 2048

    def __post_init__(self) -> None:
        check_cached(self.tier, self.cached)

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())

    def room(self, need: int, spare: int) -> int:
        return need + max(256, need // 2)  # pinning memory and copying all rows takes long

    def write(self, buffer: Tensor, first: int, x: Tensor) -> None:
        copy_heads(buffer[:, :, first : first + x.shape[2]], x)
        if x.is_cuda and torch.cuda.is_available():
            torch.cuda.current_stream(x.device).synchronize()  # the CPU may read them next

    def bridge(self, device: torch.device) -> Fetching:
        return Fetching(self.tier, device, HotRows(self.cached), self.release)
