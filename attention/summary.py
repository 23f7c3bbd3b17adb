"""What a store keeps beside its keys, so that a method can select without reading them.

A ``Summary`` is a pure function of the keys of a row, as they are stored or as they were before RoPE, and of
where that row begins. A store keeps its entries in a buffer. After an append it computes only the entries
that the new keys change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .errors import FarspanError
from .kv import KV
from .needs import Inputs
from .ops.int4_scores import Int4, quantise_int4
from .ops.pool import pool


class Summary(Protocol):
    """A function of the keys of a row, one entry per block of keys or per key.

    block: keys per entry; entry j of row b summarises the keys from position start[b] + j * block on. None: a
    label of each key, where entry j belongs to the j-th key that is here, which is at position j where all
    are. dtype: of the entries; None: the keys' own. before_rope: whether the keys are those before RoPE; the
    method needs ``keys_before_rope`` then.
    """

    @property
    def key(self) -> tuple: ...  # equal keys mean equal contents

    @property
    def block(self) -> int | None: ...

    @property
    def dtype(self) -> torch.dtype | None: ...

    @property
    def before_rope(self) -> bool: ...

    def width(self, head_dim: int) -> int: ...

    def compute(
        self, k: Tensor
    ) -> Tensor: ...  # [B, Hkv, T, D], aligned to a block -> [B, Hkv, ceil(T / block), width]


def count_entries(summary: Summary, length: int) -> int:
    """The number of entries that summarise ``length`` keys of a row."""
    return -(-length // (summary.block or 1))


def entry_bytes(summary: Summary, head_dim: int, element_size: int) -> int:
    """Bytes of one entry, for keys of ``head_dim`` numbers of ``element_size`` bytes."""
    return summary.width(head_dim) * (element_size if summary.dtype is None else summary.dtype.itemsize)


@dataclass(frozen=True)
class BlockPool:
    """Keys pooled over blocks: one entry of ``len(modes) * D`` numbers per block, the modes side by side.
    before_rope: of keys as they were before RoPE."""

    block: int
    modes: tuple[str, ...] = ("mean",)
    dtype: ClassVar[None] = None
    before_rope: bool = False

    @property
    def key(self) -> tuple:
        return ("pool", self.block, self.modes, self.before_rope)

    def width(self, head_dim: int) -> int:
        return len(self.modes) * head_dim

    def compute(self, k: Tensor) -> Tensor:
        return pool(k, self.block, mode=self.modes)


@dataclass(frozen=True)
class Channels:
    """Chosen channels of every key, a label of r numbers: ``channels`` [Hkv, r], which ones per KV head."""

    channels: Tensor = field(compare=False)
    block: ClassVar[None] = None
    dtype: ClassVar[None] = None
    before_rope: ClassVar[bool] = False

    @cached_property
    def key(self) -> tuple:
        return ("channels", tuple(map(tuple, self.channels.tolist())))

    def width(self, head_dim: int) -> int:
        return self.channels.shape[1]

    def on(self, device: torch.device) -> Tensor:
        """``channels`` on a device, moved there once."""
        if device not in self._placed:
            self._placed[device] = self.channels.to(device)
        return self._placed[device]

    @cached_property
    def _placed(self) -> dict[torch.device, Tensor]:
        return {}

    def compute(self, k: Tensor) -> Tensor:
        b, h, t, _ = k.shape
        return k.gather(3, self.on(k.device)[None, :, None].expand(b, h, t, -1))


@dataclass(frozen=True)
class Int4Keys:
    """Keys in four bits around the mean of their block (``ops.int4_scores``): a block's means and its keys'
    scales in float32, then their bits, side by side as bytes."""

    block: int
    dtype: ClassVar[torch.dtype] = torch.uint8
    before_rope: ClassVar[bool] = False

    @property
    def key(self) -> tuple:
        return ("int4", self.block)

    def width(self, head_dim: int) -> int:
        return 4 * (head_dim + self.block) + -(-self.block * head_dim // 8) * 4

    def compute(self, k: Tensor) -> Tensor:
        k4 = quantise_int4(k.float() if k.dtype == torch.float64 else k, self.block)
        fill = -k.shape[2] % self.block
        scale = pad(k4.scale, (0, fill)).unflatten(2, (-1, self.block))
        packed = pad(k4.packed, (0, 0, 0, fill)).unflatten(2, (-1, self.block)).flatten(3)
        packed = pad(packed, (0, -packed.shape[3] % 4))
        return torch.cat([k4.mean.float().view(torch.uint8), scale.view(torch.uint8), packed], 3)

    def keys(self, entries: Tensor, like: KV) -> Int4:
        """Those of the keys of ``like`` [B, Hkv, T] out of their entries."""
        t, d = like.length, like.head_dim
        mean, scale, packed = entries.split(
            [4 * d, 4 * self.block, entries.shape[3] - 4 * (d + self.block)], 3
        )
        packed = packed[..., : self.block * d // 2].unflatten(3, (self.block, d // 2))
        return Int4(
            packed=packed.flatten(2, 3)[:, :, :t],
            scale=scale.view(torch.float32).flatten(2)[:, :, :t],
            mean=mean.view(torch.float32).to(like.dtype),
            block=self.block,
        )


class Summaries:
    """The entries of each summary of one layer's keys, extended as keys are appended; never rebuilt."""

    def __init__(self) -> None:
        self._kept: dict[
            tuple, tuple[Tensor, int]
        ] = {}  # key -> (buffer [B, Hkv, room, width], keys taken in)

    def get(
        self,
        summary: Summary,
        kv: KV,
        start: Tensor | None,
        offset: int = 0,
        inputs: Inputs | None = None,
    ) -> Tensor:
        """Entries [B, Hkv, count_entries, width] for all keys; what is new in kv is taken in now.

        kv [B, Hkv, Tk - offset], of which only the keys are read: those from position ``offset`` on, which is
        at most ``open``'s. inputs: of the call, where the summary is of keys before RoPE.
        """
        length = offset + kv.length
        buffer, done = self.room(summary, kv, length), self.done(summary)
        if done < length:
            if summary.before_rope:
                kv, offset = self._before_rope(summary, kv, start, offset, inputs)
            self._extend(summary, buffer, kv, start, done, offset)
        self._kept[summary.key] = (buffer, length)
        return buffer[:, :, : count_entries(summary, length)]

    def _before_rope(
        self, summary: Summary, kv: KV, start: Tensor | None, offset: int, inputs: Inputs | None
    ) -> tuple[KV, int]:
        """The keys that may change entries, as they were before RoPE, and the position of the first."""
        if inputs is None:
            raise FarspanError(
                "A summary of keys before RoPE was asked for in a call that feeds none: its method must "
                "declare keys_before_rope in its needs, and run in a patched model."
            )
        first = self.open(summary, None if start is None else start.tolist())
        k = inputs.stored_before_rope(kv[:, :, first - offset :].k, first)
        return KV(k, k), first

    def done(self, summary: Summary) -> int:
        """How many keys have been taken in."""
        return self._kept[summary.key][1] if summary.key in self._kept else 0

    def open(self, summary: Summary, starts: list[int] | None) -> int:
        """Position of the first key of the earliest block that the next new key may change."""
        done, block = self.done(summary), summary.block or 1
        if starts is None or summary.block is None:
            return done // block * block
        return min(first + max(done - first, 0) // block * block for first in starts)

    def room(self, summary: Summary, kv: KV, length: int, done: int | None = None) -> Tensor:
        """The buffer [B, Hkv, room, width] with place for ``length`` keys like those of kv [B, Hkv, any].

        done: the caller fills the entries itself, up to that many keys.
        """
        need = count_entries(summary, length)
        buffer, known = self._kept.get(summary.key, (None, 0))
        if buffer is None or buffer.shape[2] < need:
            size = (*kv.shape[:2], need + max(64, need // 8), summary.width(kv.head_dim))
            grown = torch.empty(size, dtype=summary.dtype or kv.dtype, device=kv.device)
            if buffer is not None:
                grown[:, :, : buffer.shape[2]] = buffer
            buffer = grown
        self._kept[summary.key] = (buffer, known if done is None else done)
        return buffer

    @staticmethod
    def _extend(
        summary: Summary, buffer: Tensor, kv: KV, start: Tensor | None, done: int, offset: int
    ) -> None:
        block, t = summary.block or 1, offset + kv.length
        if start is None or summary.block is None:
            first = done // block  # the block that was still open is summarised again, from its first key
            new = summary.compute(kv[:, :, first * block - offset :].k)
            buffer[:, :, first : first + new.shape[2]] = new
            return
        for begin, rows in by_start(start.tolist()):
            if begin >= t:
                continue
            first = max(done - begin, 0) // block
            new = summary.compute(kv[rows][:, :, begin + first * block - offset :].k)
            buffer[rows, :, first : first + new.shape[2]] = new

    def crop(self, length: int) -> None:
        """Forget everything that keys at or after ``length`` went into; the open block is summarised again
        when asked."""
        # One key less than what is left is taken for done, so that the block it lies in counts as changed.
        self._kept = {
            key: (buffer, done if done <= length else max(length - 1, 0))
            for key, (buffer, done) in self._kept.items()
        }

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to the batch dimension of every buffer (reorder, repeat or select rows)."""
        self._kept = {key: (change(buffer), done) for key, (buffer, done) in self._kept.items()}

    def clear(self) -> None:
        self._kept.clear()


class SomeRows(Summaries):
    """The entries of ``rows`` of a batch, out of those of the whole batch: kv [B, Hkv, Tk], whose rows begin
    at ``start``, and the call's ``inputs``. first: how many positions of padding the rows are without."""

    def __init__(
        self,
        whole: Summaries,
        kv: KV,
        start: Tensor | None,
        rows: slice,
        first: int = 0,
        inputs: Inputs | None = None,
    ) -> None:
        super().__init__()
        self._whole, self._kv, self._start, self._rows, self._first = whole, kv, start, rows, first
        self._inputs = inputs

    def get(
        self,
        summary: Summary,
        kv: KV,
        start: Tensor | None,
        offset: int = 0,
        inputs: Inputs | None = None,
    ) -> Tensor:
        entries = self._whole.get(summary, self._kv, self._start, inputs=self._inputs)[self._rows]
        if summary.block is None:
            entries = entries[:, :, self._first :]
        return entries[:, :, : count_entries(summary, kv.length)]

    def done(self, summary: Summary) -> int:
        return self._whole.done(summary)

    def room(self, summary: Summary, kv: KV, length: int, done: int | None = None) -> Tensor:
        return self._whole.room(summary, self._kv, length, done)[self._rows]


def by_start(starts: list[int]) -> list[tuple[int, list[int] | slice]]:
    """Rows grouped by where they begin, so that equal rows are summarised in one go."""
    groups: dict[int, list[int]] = {}
    for row, begin in enumerate(starts):
        groups.setdefault(begin, []).append(row)
    return [
        (begin, slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else rows)
        for begin, rows in groups.items()
    ]
