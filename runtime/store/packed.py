"""The older positions of a store in groups of few bits, in growing buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...attention.kv import KV
from ...attention.packing import Packing
from ...attention.quantised import Quantised
from .memory import Memory

_KEY_STEPS = 1  # the buffer with one entry per group; the others have one per position


class Packed:
    """The first positions of a store, rounded as ``packing`` says, in whole groups.

    length: number of positions. channels: [B, Hkv, 1, C] int64, the key channels that are kept as they are;
    set before the first append.
    """

    def __init__(self, packing: Packing, memory: Memory) -> None:
        self.packing, self._memory = packing, memory
        self.length = 0
        self.channels: Tensor | None = None
        self.buffers: tuple[Tensor, ...] = ()  # codes and steps of keys, the same of values, outliers

    @property
    def group(self) -> int:
        """Positions of a group."""
        return self.packing.group

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Add keys and values [B, Hkv, n] of whole groups. valid: [B, n] bool, False at padding; None: there
        is none."""
        assert self.channels is not None
        new = self.packing.encode(k, v, valid, self.channels)
        begin, end = self.length, self.length + k.shape[2]
        if not self.buffers or end > self.buffers[0].shape[2]:
            self._make_room(new, end + max(256, end // 8))
        for i, (buffer, x) in enumerate(zip(self.buffers, new, strict=True)):
            buffer[:, :, self._entries(i, begin) : self._entries(i, end)] = x
        self.length = end

    def followed_by(self, recent: KV) -> KV:
        """These and the plain keys and values of later positions."""
        if self.length == 0:
            return recent
        assert self.channels is not None
        views = [x[:, :, : self._entries(i, self.length)] for i, x in enumerate(self.buffers)]
        return Quantised(*views[:4], *recent.stored, views[4], self.channels, packing=self.packing)

    def crop(self, length: int, like: KV) -> KV:
        """Keep the first ``length`` positions. Those of a group of which the crop leaves a part are returned,
        decoded. like: plain keys and values of no position."""
        whole = length // self.group * self.group
        rest = KV(*self.followed_by(like)[:, :, whole:length].dense())
        self.length = whole
        if not whole:
            self.clear()
        return rest

    def drop(self, count: int) -> None:
        """Drop the first ``count`` positions, which are whole groups, and release their memory."""
        old, self.length = self.buffers, self.length - count
        self.buffers = ()
        if self.length:
            kept = [
                x[:, :, self._entries(i, count) : self._entries(i, count + self.length)]
                for i, x in enumerate(old)
            ]
            self._make_room(kept, self.length + max(256, self.length // 8))
            for i, x in enumerate(kept):
                self.buffers[i][:, :, : x.shape[2]] = x

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to the batch dimension of every buffer (reorder, repeat or select rows)."""
        self.buffers = tuple(change(x) for x in self.buffers)
        if self.channels is not None:
            self.channels = change(self.channels)

    def clear(self) -> None:
        """Drop everything."""
        self.buffers, self.length, self.channels = (), 0, None

    def held(self) -> dict[str, Any]:
        """All that is packed, for ``restore``. The tensors are views."""
        views = [x[:, :, : self._entries(i, self.length)] for i, x in enumerate(self.buffers)]
        return {"stored": views, "length": self.length, "channels": self.channels}

    def restore(self, held: Mapping[str, Any]) -> None:
        """Have what another one has held; it is copied."""
        self.channels = held["channels"]
        if held["length"]:
            self._make_room(held["stored"], held["length"] + max(256, held["length"] // 8))
            for buffer, x in zip(self.buffers, held["stored"], strict=True):
                buffer[:, :, : x.shape[2]] = x
        self.length = held["length"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        """A copy in the same memory."""
        new = memo[id(self)] = Packed(self.packing, self._memory)
        new.restore(self.held())
        return new

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the buffers."""
        return sum([x.nbytes for x in self.buffers])

    def _entries(self, i: int, positions: int) -> int:
        """Entries that the i-th buffer has for ``positions``."""
        return positions // self.group if i == _KEY_STEPS else positions

    def _make_room(self, like: list[Tensor] | tuple[Tensor, ...], room: int) -> None:
        """Buffers for ``room`` positions and more, with what the present ones hold."""
        room = -(-room // self.group) * self.group
        made = []
        for i, x in enumerate(like):
            b, h, _, d = x.shape
            buffer = self._memory.empty((b, h, self._entries(i, room), d), x)
            if self.buffers:
                done = self._entries(i, self.length)
                buffer[:, :, :done] = self.buffers[i][:, :, :done]
            made.append(buffer)
        self.buffers = tuple(made)


def no_channels(like: Tensor) -> Tensor:
    """The numbers of no channels, for keys ``like`` [B, Hkv, any, any]."""
    return torch.empty(*like.shape[:2], 1, 0, dtype=torch.long, device=like.device)
