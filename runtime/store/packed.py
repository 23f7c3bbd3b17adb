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

_SPARE = 8  # buffers grow by this part of themselves
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
            self._grow(self._stored() or [x[:, :, :0] for x in new], end)
        for i, (buffer, x) in enumerate(zip(self.buffers, new, strict=True)):
            self._memory.write(buffer, self._entries(i, begin), x)
        self.length = end

    def followed_by(self, recent: KV) -> KV:
        """These and the plain keys and values of later positions."""
        if self.length == 0:
            return recent
        assert self.channels is not None
        views = self._stored()
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
        kept = self._stored(count)
        self.buffers, self.length = (), self.length - count
        if self.length:
            self._grow(kept, self.length)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to the batch dimension of every buffer (reorder, repeat or select rows)."""
        filled = [self._entries(i, self.length) for i in range(len(self.buffers))]
        self.buffers = tuple(
            self._memory.map_rows(x, n, change) for x, n in zip(self.buffers, filled, strict=True)
        )
        if self.channels is not None:
            self.channels = change(self.channels)

    def clear(self) -> None:
        """Drop everything."""
        self.buffers, self.length, self.channels = (), 0, None

    def held(self) -> dict[str, Any]:
        """All that is packed, for ``restore``. The tensors are views."""
        return {"stored": self._stored(), "length": self.length, "channels": self.channels}

    def restore(self, held: Mapping[str, Any]) -> None:
        """Have what another one has held; it is copied."""
        self.channels = held["channels"]
        if held["length"]:
            self._grow(held["stored"], held["length"])
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

    def _stored(self, first: int = 0) -> list[Tensor]:
        """Views of what the buffers hold of the positions from ``first`` on, which begins a group."""
        return [
            x[:, :, self._entries(i, first) : self._entries(i, self.length)]
            for i, x in enumerate(self.buffers)
        ]

    def _grow(self, held: list[Tensor], need: int) -> None:
        """Make buffers that begin with ``held`` and have room for ``need`` positions and more."""
        room = -(-self._memory.room(need, _SPARE) // self.group) * self.group
        self.buffers = tuple(self._memory.grown(x, self._entries(i, room)) for i, x in enumerate(held))


def no_channels(like: Tensor) -> Tensor:
    """The numbers of no channels, for keys ``like`` [B, Hkv, any, any]."""
    return torch.empty(*like.shape[:2], 1, 0, dtype=torch.long, device=like.device)
