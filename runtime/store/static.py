"""A KVStore of fixed size, and the decode step of one token on it.

The buffers are made for N positions once and never move. The length is also on the device, where the fused
steps of methods read it (attention/static_step.py), so such a step is the same for every token and waits for
nothing on a GPU. Everything else, prefill, several tokens in a call, beams and crops, goes the way of a
growing store, of which this one is a subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...attention.errors import FarspanError
from ...attention.keys import State
from ...attention.kv import KV
from ...attention.sources import Recent
from ...attention.static_step import StaticStep
from ...attention.summary import Kept, Summaries, Summary
from .buffers import Buffers
from .lasting import lasting
from .storage import DEVICE, Storage
from .store import KVStore


class Clock:
    """Where a step stands, on the devices of the stores of one cache, which share it.

    stepping: whether a step of one token runs, which stores the new token itself. padded_right: whether the
    last other call had padding on the right, so that no step can follow.
    """

    def __init__(self) -> None:
        self.stepping = self.padded_right = False
        self._total, self._starts = 0, [0]
        self._lengths: dict[torch.device, Tensor] = {}
        self._firsts: dict[torch.device, Tensor] = {}

    def begin(self, total: int, starts: list[int]) -> None:
        """Begin a step after which there are ``total`` positions, of rows that begin at ``starts``."""
        self.stepping, self._total = True, total
        for length in self._lengths.values():
            length.fill_(total)
        if starts != self._starts:
            stays = len(starts) == len(self._starts) and any(starts)
            self._starts = starts
            self._firsts = {d: x.copy_(torch.tensor(starts)) for d, x in self._firsts.items() if stays}

    def come_to(self, device: torch.device) -> None:
        """Be on ``device`` in the present step."""
        if device not in self._lengths:
            with lasting():
                self._lengths[device] = torch.full((1,), self._total, dtype=torch.int32, device=device)
        if device not in self._firsts and any(self._starts):
            with lasting():
                self._firsts[device] = torch.tensor(self._starts, device=device)

    def length(self, device: torch.device) -> Tensor:
        """[1] int32: the number of positions with those of the step."""
        return self._lengths[device]

    def start(self, device: torch.device) -> Tensor | None:
        """[B]: the first position of each row; None where no row is padded."""
        return self._firsts.get(device)


class FixedSummaries(Summaries):
    """Summaries in buffers for ``room`` positions, which do not move."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room

    def room(self, summary: Kept, like: Tensor, batch: int, length: int) -> Tensor:
        if summary.key in self._kept and self._kept[summary.key].buffer.shape[0] != batch:
            del self._kept[summary.key]
        buffer = super().room(summary, like, batch, max(length, self._room))
        self._kept[summary.key].done = length
        return buffer

    def complete(self, summary: Summary, length: int) -> bool:
        """Whether the entries are those of the first ``length`` positions."""
        kept = self._kept.get(summary.key)
        return kept is not None and kept.done == length and kept.current

    def buffer(self, summary: Summary) -> Tensor:
        """All entries [B, Hkv, room, width]."""
        return self._kept[summary.key].buffer

    def buffers(self) -> list[Tensor]:
        """Those of all summaries."""
        return [kept.buffer for kept in self._kept.values()]

    def appended(self, summary: Summary, whole: bool) -> None:
        """One position more was taken in. whole: False where that failed, so that the open entry may hold
        what it should not."""
        kept = self._kept[summary.key]
        kept.done, kept.current = kept.done + whole, whole

    def clear(self) -> None:
        """Forget all entries; their buffers stay."""
        for kept in self._kept.values():
            kept.done = 0
        self.recent = Recent()

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for kept in self._kept.values():
            kept.buffer = _in_place(kept.buffer, change(kept.buffer))
        self.recent = self.recent.map_rows(change)


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.shape[:2], x.shape[3], x.dtype, x.device


def _in_place(buffer: Tensor, new: Tensor) -> Tensor:
    """``new`` in the memory of ``buffer`` where it has the same shape."""
    return buffer.copy_(new) if buffer.shape == new.shape else new


class FixedBuffers(Buffers):
    """Buffers for at most ``most`` positions, which are made once and stay where they are for any sequence of
    as many rows on the same device."""

    def __init__(self, most: int) -> None:
        super().__init__(DEVICE)
        self.most = most

    def room(self, need: int) -> int:
        check_room(need, self.most)
        return self.most

    @property
    def kv(self) -> KV | None:
        return super().kv if self.length else None

    def fit(self, new: KV) -> bool:
        """Whether they are those of as many rows and heads as ``new`` has, of the same dtype and device."""
        return [_kind(x) for x in self.tensors] == [_kind(x) for x in new.stored]

    def clear(self) -> None:
        self.resize(0)

    def _mapped(self, buffer: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        new = change(buffer[:, :, : self.length])
        if buffer.shape[0] != new.shape[0]:
            return self._grown(new, self.most)
        buffer[:, :, : self.length] = new
        return buffer


class StaticStore(KVStore):
    """A KVStore for at most ``room`` positions, whose buffers are made once. clock: shared by the stores of a
    cache."""

    impl = "auto"  # which implementation of operations a step runs

    def __init__(self, room: int, clock: Clock) -> None:
        self.room, self.clock = room, clock
        super().__init__()
        self.buffers: FixedBuffers
        self.step = StoredKeys(self)
        self.summaries: FixedSummaries = FixedSummaries(room)

    def make_buffers(self, storage: Storage) -> FixedBuffers:
        return FixedBuffers(self.room)

    def extend(self, new: KV) -> None:
        if self.clock.stepping:
            self.step.new = new  # the step of the method stores it
            return
        check_room(self.length + new.length, self.room)
        if torch.is_grad_enabled() and any(x.requires_grad for x in new.stored):
            raise FarspanError(
                "A cache under static= is written in place, which no gradient can follow: call the model "
                "under torch.no_grad(), or patch without static."
            )
        if not self.length and not self.buffers.fit(new):
            self.buffers.tensors = ()
            self.summaries, self.step = FixedSummaries(self.room), StoredKeys(self)
        super().extend(new)

    @property
    def starts(self) -> list[int] | None:
        """The positions at which rows begin; None where no call of the model has said."""
        return self._starts

    def begin(self, step: StaticStep) -> None:
        """Prepare a step that stores the next token: what it reads beside the keys becomes complete, and is
        where it always is. Raises FarspanError where the store is full."""
        check_room(self.length + 1, self.room)
        self.clock.come_to(self.buffers.tensors[0].device)
        if step.summary is not None and not self.summaries.complete(step.summary, self.length):
            self.summarise(step.summary)
        self.step.pin()
        step.begin(self.step)

    def finish(self, step: StaticStep, done: bool) -> None:
        """End a step. done: whether it has stored its token."""
        if step.summary is not None:
            self.summaries.appended(step.summary, done)
        if done:
            self.buffers.resize(self.length + 1)
            self._handles = None
        else:
            self.states.clear()


class StoredKeys:
    """The ``StaticKeys`` of a store."""

    def __init__(self, store: StaticStore) -> None:
        self._store = store
        self._name = ""  # by which the state of the layer's method is kept
        self._state: State | None = None  # taken where a step asks for it
        self._new: KV | None = None
        self._pinned: State = {}  # the memory in which the state stays
        self._numbers: dict[str, tuple[int, Tensor]] = {}

    @property
    def impl(self) -> str:
        return self._store.impl

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self._store.buffers.tensors

    @property
    def new(self) -> KV:
        assert self._new is not None, "the attention of a layer was called without an update of its cache"
        return self._new

    @new.setter
    def new(self, new: KV) -> None:
        self._new = new

    @property
    def buffers(self) -> KV:
        return self._store.storage.format(*self._tensors)

    @property
    def length(self) -> Tensor:
        return self._store.clock.length(self._tensors[0].device)

    @property
    def start(self) -> Tensor | None:
        return self._store.clock.start(self._tensors[0].device)

    def seen(self) -> list[int]:
        total = self._store.length + 1
        return [total - first for first in self._store.starts or [0]]

    def position(self) -> int:
        return self._store.length

    def entries(self, summary: Summary) -> Tensor:
        return self._store.summaries.buffer(summary)

    def set_number(self, name: str, value: int) -> None:
        known = self._numbers.get(name)
        if known is None:
            with lasting():
                there = torch.full((1,), value, dtype=torch.int32, device=self._tensors[0].device)
            self._numbers[name] = value, there
        elif known[0] != value:
            self._numbers[name] = value, known[1].fill_(value)

    def number(self, name: str) -> Tensor:
        return self._numbers[name][1]

    @property
    def state(self) -> State:
        if self._state is None:
            store, batch = self._store, self._tensors[0].shape[0]
            alike = len(store.states.groups(batch)) == 1
            past = store.length
            self._state = store.states.of(self._name, slice(0, batch), past, past + 1) if alike else {}
        return self._state

    def of_next(self, name: str) -> StoredKeys:
        """These, for a next step of the method that is kept as ``name``."""
        self._name, self._state = name, None
        return self

    def pin(self) -> None:
        """Move the state's tensors to where those of earlier steps were, if they have the same shape."""
        for name, x in (self._state or {}).items():
            fixed = self._pinned.get(name)
            if fixed is None or fixed.shape != x.shape:
                self._pinned[name] = x
            elif fixed is not x:
                self.state[name] = fixed.copy_(x)

    def pointers(self) -> list[int]:
        """The addresses of all that a step reads and writes beside its arguments."""
        numbers = [x for _, x in self._numbers.values()]
        start = [] if self.start is None else [self.start]
        every = (
            *self._tensors,
            *self._store.summaries.buffers(),
            *self._pinned.values(),
            *numbers,
        )
        return [x.data_ptr() for x in (*every, self.length, *start)]


def check_room(total: int, room: int) -> None:
    """Raise FarspanError where a store of ``room`` positions cannot hold ``total``."""
    if total > room:
        raise FarspanError(
            f"The cache has room for {room} positions (static={room}), and this call needs {total}: patch "
            "with a larger static, or generate fewer tokens."
        )
