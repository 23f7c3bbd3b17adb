"""Keys and values in buffers that grow: in one format, packed or not, and in one memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ...attention.errors import FarspanError
from ...attention.kv import KV
from ...attention.offloaded import Offloaded
from ...attention.parts import of_heads
from .bridges import Fetching, StoreBridge
from .hot_rows import HotRows
from .packed import Packed
from .storage import Storage


class Buffers:
    """Keys and values [B, Hkv, length] of some KV heads of a layer, as ``storage`` says.

    The buffers grow geometrically, so that the past is copied once in many tokens.

    tensors: the buffers of ``KV.stored``, [B, Hkv, room, any] each; with a packing, those of the positions
    that are not packed. packed: the earlier positions; None without a packing. length: of both.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.tensors: tuple[Tensor, ...] = ()
        self.packed = None if storage.packing is None else Packed(storage.packing, storage.memory)
        self.length = 0
        self._spare = 8  # buffers grow by this part of themselves
        self._kv: KV | None = None  # all that is stored; made on first use
        self._bridge: StoreBridge | None = None  # to the queries, where the buffers are in another memory
        self._recent: KV | None = None  # the positions of the present call, where they are on the device

    @property
    def kv(self) -> KV | None:
        """Views of the buffers; None while they are empty."""
        if self._kv is None and self.tensors:
            kv = self._plain()
            if self.packed is not None:
                kv = self.packed.followed_by(kv)
            elif self._recent is not None and self._recent.length == self.length:
                kv = self._recent
            elif self._bridge is not None:
                kv = Offloaded(kv, self._bridge, self._recent)
            self._kv = kv
        return self._kv

    @property
    def here(self) -> bool:
        """Whether the buffers hold plain numbers that the device reads as they are."""
        return self.storage.format is KV and self.packed is None and self._bridge is None

    @property
    def unpacked(self) -> int:
        """Number of the last positions, which are not packed."""
        return self.length - (0 if self.packed is None else self.packed.length)

    @property
    def batch(self) -> int:
        """B; 0 while there are no buffers."""
        return self.tensors[0].shape[0] if self.tensors else 0

    def _plain(self) -> KV:
        return self.storage.format(*[x[:, :, : self.unpacked] for x in self.tensors])

    def room(self, need: int) -> int:
        """The positions for which buffers are made that must hold ``need`` and may grow."""
        return self.storage.memory.room(need, self._spare)

    def extend(self, new: KV) -> None:
        """Add keys and values [B, Hkv, n] that are in the storage's format already."""
        new = new.on_device()
        self._reach(new)
        filled = self.unpacked
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*new.stored, *self.tensors)):
            self._refuse_gradient()
            # Autograd keeps earlier views, so the tensors are joined and not written in place.
            parts = [self._plain().stored, new.stored] if self.tensors else [new.stored]
            self.tensors = tuple(torch.cat(x, 2) for x in zip(*parts, strict=True))
            self.resize(self.length + new.length)
            return
        if not self.tensors or filled + new.length > self.tensors[0].shape[2]:
            room = self.room(filled + new.length)
            olds = [x[:, :, :filled] for x in self.tensors] or [x[:, :, :0] for x in new.stored]
            self.tensors = tuple(self._grown(x, room) for x in olds)
            self._changed()
        for buffer, x in zip(self.tensors, new.stored, strict=True):
            self.storage.memory.write(buffer, filled, x)
        self.resize(self.length + new.length)
        if self._bridge is not None and not self._bridge.reaches:
            self._recent = new

    def _reach(self, new: KV) -> None:
        """Make the bridge from the memory to the queries, which are where ``new`` is."""
        if self._bridge is None or self._bridge.device != new.device:
            self._bridge = self.storage.memory.bridge(new.device)
        if self._bridge is None:
            return
        self._bridge.arrive()
        if self.packed is not None and new.device.type != "cpu":
            raise FarspanError(
                f"A cache in {self.storage} was asked for on {new.device.type}, and packed keys in another "
                "memory are served on the CPU only: leave one part of the storage out."
            )

    def _refuse_gradient(self) -> None:
        if self.packed is not None or self._bridge is not None:
            raise FarspanError(
                f"A cache in {self.storage} is written in place, which no gradient can follow: call the "
                "model under torch.no_grad(), or patch with storage='device'."
            )

    def _changed(self) -> None:
        """Drop what the bridge keeps of rows, which have changed or lie elsewhere now."""
        self._recent = self._kv = None
        if self._bridge is not None:
            self._bridge.forget(math.prod(self.tensors[0].shape[:2]) if self.tensors else 0)

    def settle(self) -> None:
        """End a call of the layer: in another memory than that of the queries, free what the call has brought
        out of it."""
        if self._bridge is not None:
            self._recent = self._kv = None
            for buffer in (*self.tensors, *(() if self.packed is None else self.packed.buffers)):
                self.storage.memory.release(buffer)

    def prefetch(self, select: Callable[[KV], Tensor | None], given: tuple[Tensor, ...]) -> None:
        """Begin to bring the rows [B, Hkv, R] that ``select`` finds to the device, where they are not there.
        given: the tensors that ``select`` reads."""
        kv, bridge = self.kv, self._bridge
        if not isinstance(bridge, Fetching) or not isinstance(kv, Offloaded):
            return

        def fetch() -> None:
            rows = select(kv)
            if rows is not None:
                bridge.warm(kv.far, rows)

        bridge.ahead(fetch, given)

    def pack(self, count: int, valid: Tensor | None, spare: int) -> None:
        """Pack the first ``count`` positions that are not packed, which are whole groups. valid: [B, count]
        bool, False at padding; None: there is none. spare: room for later positions beside a group."""
        assert self.packed is not None
        k, v = (x[:, :, :count] for x in self.tensors)
        left = [x[:, :, count : self.unpacked] for x in self.tensors]
        room = max(self.packed.packing.window + self.packed.group + spare, left[0].shape[2])
        self.packed.append(k, v, valid)
        self.tensors = tuple(self._grown(x, room) for x in left)
        self.resize(self.length)

    def resize(self, length: int) -> None:
        """Set the number of positions to ``length``, which the buffers have."""
        self.length, self._kv = length, None

    def shorten(self, length: int) -> None:
        """Keep the first ``length`` positions. Nothing is written to the buffers."""
        if self.packed is not None and length < self.packed.length:
            like = self.storage.format(*[x[:, :, :0] for x in self.tensors])
            rest = self.packed.crop(length, like)
            rooms = [buffer.shape[2] for buffer in self.tensors]
            self.tensors = tuple(self._grown(x, n) for x, n in zip(rest.stored, rooms, strict=True))
        self.resize(length)
        self._changed()

    def drop_first(self, count: int, room: int) -> int:
        """Drop the first ``count`` positions, or with a packing the whole groups among them, and release
        their memory. room: of the buffers afterwards. Returns how many were dropped."""
        old, filled = 0, self.unpacked
        if self.packed is not None and self.packed.length:
            count = count // self.packed.group * self.packed.group
            if not count:
                return 0
            old, room = min(count, self.packed.length), self.tensors[0].shape[2]
            self.packed.drop(old)
        if count > old:
            self.tensors = tuple(self._grown(x[:, :, count - old : filled], room) for x in self.tensors)
        self.resize(self.length - count)
        self._changed()
        return count

    def keep(self, kept: KV, room: int) -> None:
        """Have the keys and values ``kept`` alone, in buffers for ``room`` positions, or in the present ones
        where these are large enough and not twice as large."""
        if not kept.length <= self.tensors[0].shape[2] <= 2 * room:
            self.tensors = tuple(self._grown(x, room) for x in kept.stored)
        else:
            for buffer, x in zip(self.tensors, kept.stored, strict=True):
                self.storage.memory.write(buffer, 0, x)
        self.resize(kept.length)
        self._changed()

    def keep_heads(self, heads: list[int], room: int) -> None:
        """Have these KV heads alone, in buffers for ``room`` positions. They grow by less from now on, not to
        spend again what the other heads have freed."""
        self.tensors = tuple(self._grown(x, room) for x in of_heads(self._plain(), heads).stored)
        self._spare = 16
        self._changed()

    def clear(self) -> None:
        """Drop everything and release the memory."""
        self.tensors, self._spare = (), 8
        if self.packed is not None:
            self.packed.clear()
        self.resize(0)
        self._changed()

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to the batch dimension (reorder, repeat or select rows)."""
        self.tensors = tuple(self._mapped(x, change) for x in self.tensors)
        if self.packed is not None:
            self.packed.map_rows(change)
        self._changed()

    def _mapped(self, buffer: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """``change`` of a buffer, in a buffer of as many positions."""
        return self.storage.memory.map_rows(buffer, self.unpacked, change)

    def _grown(self, x: Tensor, room: int) -> Tensor:
        return self.storage.memory.grown(x, room)

    @property
    def tiers(self) -> dict[str, int]:
        """Bytes of memory by tier, such as "device" and "disk"."""
        tiers = {"device": 0 if self._bridge is None else self._bridge.nbytes}
        held = sum([x.nbytes for x in self.tensors]) + (0 if self.packed is None else self.packed.nbytes)
        tier = self.storage.memory.tier
        tiers[tier] = tiers.get(tier, 0) + held
        return tiers

    @property
    def hot_rows(self) -> HotRows | None:
        """The rows that are kept on the device, where the memory is another one that it cannot read."""
        return self._bridge.hot if isinstance(self._bridge, Fetching) else None

    def held(self) -> dict[str, Any]:
        """All that is stored, for ``restore``. The tensors are views."""
        return {
            "stored": [x[:, :, : self.unpacked] for x in self.tensors],
            "packed": None if self.packed is None else self.packed.held(),
            "spare": self._spare,
        }

    def restore(self, held: Mapping[str, Any]) -> None:
        """Fill empty buffers with what others of the same storage held. Keys and values are copied."""
        if not held["stored"]:
            return
        self._spare, length = held["spare"], held["stored"][0].shape[2]
        self.tensors = tuple(self._grown(x, self.room(length)) for x in held["stored"])
        if self.packed is not None:
            self.packed.restore(held["packed"])
            length += self.packed.length
        self.resize(length)

    def view(self) -> Self:
        """The same keys and values, to be shortened and then copied, and not to be written."""
        new = copy.copy(self)
        new.packed = copy.copy(self.packed)
        new._kv = new._recent = new._bridge = None
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy in the same memory, with room as for new keys and values of this length."""
        new = memo[id(self)] = self.view()
        new.packed = copy.deepcopy(self.packed, memo)
        rooms = [min(x.shape[2], self.room(self.unpacked)) for x in self.tensors]
        filled = [x[:, :, : self.unpacked] for x in self.tensors]
        new.tensors = tuple(new._grown(x, n) for x, n in zip(filled, rooms, strict=True))
        if self._bridge is not None:
            new._bridge = self.storage.memory.bridge(self._bridge.device)
            new._changed()
        return new
