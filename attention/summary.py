"""What a store keeps beside its keys, so that a method can select without reading them.

A ``Summary`` is a pure function of what it ``reads`` of the positions of a row, and of where that row begins.
A store keeps its entries in a buffer. After an append it computes only the entries that the new positions
change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from .digest import weights_digest
from .kv import KV
from .offloaded import MOST_COPIED
from .ops.pool import pool
from .ops.torch_private import version_of
from .sources import IN_NO_CACHE, Recent, Source, Sources, Supply


class Kept(Protocol):
    """What a store must know of a summary whose entries it keeps; see ``Summary``."""

    @property
    def key(self) -> tuple: ...

    @property
    def block(self) -> int | None: ...

    @property
    def most(self) -> int | None: ...

    @property
    def reads(self) -> frozenset[Source]: ...


class Summary(Kept, Protocol):
    """A function of what it reads of a row, one entry per block of positions or per position.

    key: equal keys mean equal contents. A summary with learned weights has ``identity(module)`` in it.
    block: positions per entry; entry j of row b summarises those from start[b] + j * block on. None: a label
    of each position, where entry j belongs to the j-th position that is here, which is j where all are.
    most: how many entries a row has at most, those of its first blocks; None: any number.
    reads: what ``compute`` is given. Hidden states and keys before RoPE must stand in the method's ``needs``,
    too; positions are known where it needs queries or keys before RoPE.
    dtype: of the entries; None: that of what it reads.
    """

    @property
    def dtype(self) -> torch.dtype | None: ...

    def width(self, head_dim: int) -> int:
        """Numbers of one entry of one KV head, for the cost that a method declares."""
        ...

    def compute(self, x: Sources) -> Tensor:
        """Entries [B, heads, ceil(T / block), width] of T >= 1 positions, the first of which begins a block.
        heads and width are the same in every call of a layer."""
        ...


_DIGESTS: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], str]] = weakref.WeakKeyDictionary()


def identity(module: nn.Module) -> str:
    """A hash of a module's weights, for the key of a summary that owns them. Modules of equal weights have
    one identity, so a cache goes on under another patch with the same recipe; training changes it."""
    versions = tuple(map(version_of, module.parameters()))
    known = _DIGESTS.get(module)
    if known is None or known[0] != versions:
        known = versions, weights_digest(module.state_dict())
        _DIGESTS[module] = known
    return known[1]


def count_entries(summary: Kept, length: int) -> int:
    """The number of entries that summarise ``length`` keys of a row."""
    return _count(summary.block, summary.most, length)


def entry_bytes(summary: Summary, head_dim: int, element_size: int) -> int:
    """Bytes of one entry, for keys of ``head_dim`` numbers of ``element_size`` bytes."""
    return summary.width(head_dim) * (element_size if summary.dtype is None else summary.dtype.itemsize)


@dataclass(frozen=True)
class BlockPool:
    """Keys pooled over blocks: one entry of ``len(modes) * D`` numbers per block, the modes side by side.
    of: what is pooled in place of keys; hidden states count as one head."""

    block: int
    modes: tuple[str, ...] = ("mean",)
    of: Source = "keys"
    dtype: ClassVar[None] = None
    most: ClassVar[None] = None

    @property
    def key(self) -> tuple:
        return ("pool", self.block, self.modes, self.of)

    @property
    def reads(self) -> frozenset[Source]:
        return frozenset({self.of})

    def width(self, head_dim: int) -> int:
        return len(self.modes) * head_dim

    def compute(self, x: Sources) -> Tensor:
        return pool(x.tensors[self.of], self.block, mode=self.modes)


@dataclass(frozen=True)
class Channels:
    """Chosen channels of every key, a label of r numbers: ``channels`` [Hkv, r], which ones per KV head."""

    channels: Tensor = field(compare=False)
    block: ClassVar[None] = None
    dtype: ClassVar[None] = None
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"keys"})

    @cached_property
    def key(self) -> tuple:
        return ("channels", tuple(map(tuple, self.channels.tolist())))

    def width(self, head_dim: int) -> int:
        return self.channels.shape[1]

    def on(self, device: torch.device, group: int = 1) -> Tensor:
        """``channels`` on a device, moved there once; [H, r] for H = Hkv * ``group`` query heads."""
        if (device, group) not in self._placed:
            self._placed[device, group] = self.channels.to(device).repeat_interleave(group, 0)
        return self._placed[device, group]

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, int], Tensor]:
        return {}

    def compute(self, x: Sources) -> Tensor:
        k = x.keys
        b, h, t, _ = k.shape
        return k.gather(3, self.on(k.device)[None, :, None].expand(b, h, t, -1))


@dataclass(frozen=True)
class _Restored:
    """``Kept`` of entries that another store has computed."""

    key: tuple
    block: int | None
    most: int | None
    reads: frozenset[Source]


@dataclass
class _Entries:
    """buffer [B, heads, room, width]. done: number of positions taken in. current: whether the entries of the
    block that is open after ``done`` positions hold no others. most, reads: the summary's."""

    block: int | None
    most: int | None
    reads: frozenset[Source]
    buffer: Tensor
    done: int
    current: bool = True


class Summaries:
    """The entries of each summary of one layer, extended as positions are appended; never rebuilt.

    recent: queries and hidden states of the last positions, where some summary reads them.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, _Entries] = {}
        self.recent = Recent()

    def get(self, summary: Summary, supply: Supply, starts: list[int] | None) -> Tensor:
        """Entries [B, heads, count_entries, width] for all positions of ``supply``; what is new is taken
        in."""
        length, kept = supply.length, self._kept.get(summary.key)
        if length == 0 and kept is None:  # a rank may hold nothing
            return summary.compute(supply.sources(summary.reads, 0).map(_one_of_zeros))[:, :, :0]
        if kept is None or kept.done < length or not kept.current:
            first = self.open(summary, starts)
            if kept is None:
                first = min(first, length - 1)
            while first < length:
                end = min(length, first + _at_once(summary, supply.kv))
                self.extend(summary, supply.sources(summary.reads, first, end), first, starts)
                first = length if end == length else self.open(summary, starts)
            self._kept[summary.key].current = True
        return self.entries(summary, length)

    def take(self, declared: Iterable[Summary], supply: Supply, starts: list[int] | None) -> None:
        """Take in the positions of a call for all summaries in ``declared`` that read what is in no cache,
        and keep so much of it that a crop by one block, or by 32 tokens, finds its open block."""
        fed = [s for s in {s.key: s for s in declared}.values() if s.reads & IN_NO_CACHE]
        for summary in fed:
            self.get(summary, supply, starts)
        kept = [s for s in fed if s.block is not None and s.reads & IN_NO_CACHE]
        if kept:
            names = frozenset().union(*(s.reads & IN_NO_CACHE for s in kept))
            keep = max(recent_positions(s) for s in kept)
            new = supply.own(names)
            past = supply.length - next(iter(new.values())).shape[2]
            self.recent = self.recent.followed_by(new, past, keep)

    def entries(self, summary: Summary, length: int) -> Tensor:
        """The entries [B, heads, count_entries, width] of the first ``length`` positions, all taken in."""
        return self._kept[summary.key].buffer[:, :, : count_entries(summary, length)]

    def done(self, summary: Summary) -> int:
        """How many positions have been taken in."""
        return self._kept[summary.key].done if summary.key in self._kept else 0

    def open(self, summary: Summary, starts: list[int] | None) -> int:
        """Position at which the earliest block begins that the next new position may change."""
        return _open_block(summary.block, self.done(summary), starts)

    def room(self, summary: Kept, like: Tensor, batch: int, length: int) -> Tensor:
        """The buffer [batch, heads, room, width] with place for the entries of ``length`` positions, which
        the caller writes and which count as taken in. like: some entries [any, heads, any, width]."""
        need, kept = count_entries(summary, length), self._kept.get(summary.key)
        if kept is None or kept.buffer.shape[2] < need:
            room = need + max(64, need // 8)
            room = room if summary.most is None else min(room, summary.most)
            size = (batch, like.shape[1], room, like.shape[3])
            grown = torch.empty(size, dtype=like.dtype, device=like.device)
            if kept is not None:
                grown[:, :, : kept.buffer.shape[2]] = kept.buffer
            kept = self._kept[summary.key] = _Entries(summary.block, summary.most, summary.reads, grown, 0)
        kept.done, kept.current = length, True
        return kept.buffer

    def extend(self, summary: Summary, x: Sources, first: int, starts: list[int] | None) -> None:
        """Take in the positions of ``x`` that are new. first: the position at which x begins, at most
        ``open``'s."""
        block, done, end = summary.block or 1, self.done(summary), first + x.length
        # the block that was still open is summarised again, from its first position
        groups: list[tuple[int, list[int] | slice]] = [(0, slice(None))]
        if starts is not None and summary.block is not None:
            groups = [(begin, rows) for begin, rows in by_start(starts) if begin < end]
        written = []
        for begin, rows in groups:
            number = max(done - begin, 0) // block
            at = begin + number * block - first
            stop = x.length if summary.most is None else min(x.length, begin + summary.most * block - first)
            if at < stop:
                written.append((rows, number, summary.compute(x.cut(at, stop, rows=rows))))
        kept = self._kept.get(summary.key)
        like = written[0][2] if written else summary.compute(x.cut(0, 1)) if kept is None else kept.buffer
        buffer = self.room(summary, like, x.batch, end)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (buffer, *(new for *_, new in written))):
            # autograd keeps views of the earlier buffer, so that one is not written in place
            buffer = self._kept[summary.key].buffer = buffer.clone()
        for rows, number, new in written:
            buffer[rows, :, number : number + new.shape[2]] = new

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all entries, and of the queries and hidden states kept."""
        every = [kept.buffer for kept in self._kept.values()]
        return sum([x.nbytes for x in (*every, *self.recent.tensors.values())])

    def held(self) -> dict[str, Any]:
        """All entries and what is kept beside them, for ``restore``. The tensors are views."""
        entries = [
            {
                "key": key,
                "block": kept.block,
                "most": kept.most,
                "reads": kept.reads,
                "done": kept.done,
                "current": kept.current,
                "entries": kept.buffer[:, :, : _count(kept.block, kept.most, kept.done)],
            }
            for key, kept in self._kept.items()
        ]
        return {"entries": entries, "recent": (dict(self.recent.tensors), self.recent.end)}

    def restore(self, held: Mapping[str, Any]) -> None:
        """Take over what other summaries held; entries are copied."""
        for one in held["entries"]:
            kept, new = _Restored(one["key"], one["block"], one["most"], one["reads"]), one["entries"]
            self.room(kept, new, new.shape[0], one["done"])[:, :, : new.shape[2]] = new
            self._kept[kept.key].current = one["current"]
        self.recent = Recent(*held["recent"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with room as for new entries of these positions."""
        new = memo[id(self)] = copy(self)
        new._kept = {}
        new.restore(self.held())
        return new

    def why_not_cropped(self, length: int, starts: list[int] | None) -> str:
        """Why these cannot be cropped to ``length`` positions, which opens a block again that begins before
        the queries or hidden states that are kept; "" where they can."""
        for kept in self._kept.values():
            first = _open_block(kept.block, length, starts)
            if kept.block is None or kept.done <= length or first >= length:
                continue
            for name in sorted(self.recent.tensors.keys() & kept.reads & IN_NO_CACHE):
                if first < self.recent.begin(name):
                    what = name.replace("_", " ")
                    return (
                        f"This cache cannot be cropped from {kept.done} to {length} tokens, because a "
                        f"summary needs the {what} of the tokens from position {first} on, and the cache "
                        f"keeps those from position {self.recent.begin(name)} on: start a new cache."
                    )
        return ""

    def crop(self, length: int) -> None:
        """Forget everything that positions at or after ``length`` went into; the open block is summarised
        again when asked."""
        for kept in self._kept.values():
            if kept.done > length:
                kept.done, kept.current = length, kept.block is None
        self.recent = self.recent.crop(length)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to the batch dimension of every buffer (reorder, repeat or select rows)."""
        for kept in self._kept.values():
            kept.buffer = change(kept.buffer)
        self.recent = self.recent.map_rows(change)

    def clear(self) -> None:
        self._kept.clear()
        self.recent = Recent()


def _count(block: int | None, most: int | None, length: int) -> int:
    count = -(-length // (block or 1))
    return count if most is None else min(count, most)


def _open_block(block: int | None, done: int, starts: list[int] | None) -> int:
    """Position at which the earliest block begins that is open after ``done`` positions."""
    if starts is None or block is None:
        return done // (block or 1) * (block or 1)
    return min(first + max(done - first, 0) // block * block for first in starts)


def _at_once(summary: Summary, kv: KV) -> int:
    """How many positions are taken in at a time: all, or a few blocks of keys that must be copied."""
    return kv.length + 1 if kv.elsewhere is None else max(MOST_COPIED, 2 * (summary.block or 1))


def _one_of_zeros(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:2], 1, x.shape[3])


def recent_positions(summary: Summary) -> int:
    """How many of the last positions are kept of what a summary of blocks reads: the open block, and as many
    as a crop that finds it may drop, a block or twice ``attend.DECODE_ROWS``."""
    block = summary.block or 1
    return block + max(block, 32)


def by_start(starts: list[int]) -> list[tuple[int, list[int] | slice]]:
    """Rows grouped by where they begin, so that equal rows are summarised in one go."""
    groups: dict[int, list[int]] = {}
    for row, begin in enumerate(starts):
        groups.setdefault(begin, []).append(row)
    return [
        (begin, slice(rows[0], rows[-1] + 1) if rows == list(range(rows[0], rows[-1] + 1)) else rows)
        for begin, rows in groups.items()
    ]
