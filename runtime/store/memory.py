"""Where the buffers of a store lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .bridges import StoreBridge


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory of the device on which keys and values are computed. Another memory is a
    subclass, whose fields are its parameters.

    tier: its name in a spec of ``patch(storage=)``. prefetches: whether rows may have to be copied to the
    queries, so that it helps to know them before. block: positions that are written at a time, so that what
    is copied beside the buffers stays small; None: all.
    """

    tier: ClassVar[str] = "device"
    prefetches: ClassVar[bool] = False
    block: ClassVar[int | None] = None

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer of this shape, of the dtype of ``like``, whose contents are undefined. It may be written
        inside and outside of inference mode."""
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, device=like.device)

    def room(self, need: int, spare: int) -> int:
        """The positions for which a buffer is made that must hold ``need`` and may grow. spare: which part of
        them is enough for that."""
        return need + max(256, need // spare)

    def write(self, buffer: Tensor, first: int, x: Tensor) -> None:
        """Set the positions of ``buffer`` [B, Hkv, room, any] from ``first`` on to x [B, Hkv, n, any]."""
        if not x.shape[2]:
            return  # an empty copy would be a launch all the same
        if self.block is None:
            buffer[:, :, first : first + x.shape[2]] = x
            return
        for a in range(0, x.shape[2], self.block):
            part = x[:, :, a : a + self.block]
            buffer[:, :, first + a : first + a + part.shape[2]] = part
            self.release(buffer)
            self.release(x)

    def grown(self, x: Tensor, room: int) -> Tensor:
        """A buffer for ``room`` positions that begins with x [B, Hkv, n, any]."""
        buffer = self.empty((*x.shape[:2], room, x.shape[3]), x)
        self.write(buffer, 0, x)
        return buffer

    def map_rows(self, buffer: Tensor, filled: int, change: Callable[[Tensor], Tensor]) -> Tensor:
        """A buffer as large as ``buffer``, whose first ``filled`` positions are those of ``buffer`` after
        ``change`` of the batch dimension. Where positions are written a block at a time, rows of the same
        number stay in ``buffer``."""
        if self.block is None:
            return self.grown(change(buffer[:, :, :filled]), buffer.shape[2])
        new = buffer
        for a in range(0, max(1, filled), self.block):
            part = change(buffer[:, :, a : min(a + self.block, filled)])
            if part.shape[0] != new.shape[0]:
                new = self.empty((part.shape[0], *buffer.shape[1:]), buffer)
            self.write(new, a, part)
        return new

    def release(self, buffer: Tensor) -> None:
        """Free what the process holds of ``buffer`` beside its place in this memory, after it was used."""

    def bridge(self, device: torch.device) -> StoreBridge | None:
        """What brings the rows of one store to queries on ``device``; None where they are there."""
        return None
