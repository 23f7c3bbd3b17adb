"""The rows of a store in another memory that are kept on the device, because they were read lately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock

import torch
from torch import Tensor

from ...attention.errors import SpecError

Fetch = Callable[[Tensor], list[Tensor]]  # places [n] -> of each part, the rows [n, width] on the device


class HotRows:
    """Rows of several parts [n, width], such as keys and values, by their place in the buffers of a store.

    Where a new row needs a slot, it takes that of the row that was used least lately. What a call reads is
    exact: a row that is not here is fetched. Rows can be brought here before they are asked for (``warm``),
    also by another thread.

    each: slots for each list of rows; all lists share them. asked, hits: rows asked for, and those of them
    that were here.
    """

    def __init__(self, each: int) -> None:
        self._each, self.asked, self.hits = each, 0, 0
        self._lock = Lock()
        self.forget(0)

    def forget(self, lists: int) -> None:
        """Drop all rows, and have a number of slots for each of so many lists of rows from now on."""
        self.slots = self._each * lists
        self._slot_of: Tensor | None = None  # [places + 1] int32, -1: not here; the last one is nobody's
        self._parts: list[Tensor] = []  # [slots, width] each

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and of the tables."""
        if self._slot_of is None:
            return 0
        return sum([x.nbytes for x in (self._slot_of, self._place_of, self._used, *self._parts)])

    def serves(self, number: int, count: int) -> bool:
        """Whether so many rows out of ``count`` can be here at the same time."""
        return number <= min(self.slots, count)

    def counted(self) -> tuple[int, int]:
        """``asked`` and ``hits`` since the last call of this."""
        counts = self.asked, self.hits
        self.asked = self.hits = 0
        return counts

    def gather(self, places: Tensor, count: int, fetch: Fetch) -> list[Tensor]:
        """The rows at ``places`` [n] int64 out of ``count``, of each part. n is at most ``serves``'s."""
        with self._lock:
            slots, missed = self._find(places, count, fetch)
            self.asked, self.hits = self.asked + len(places), self.hits + len(places) - missed
            return [x.index_select(0, slots) for x in self._parts]

    def warm(self, places: Tensor, count: int, fetch: Fetch) -> None:
        """Bring the rows at ``places`` here."""
        with self._lock:
            self._find(places, count, fetch)

    def _find(self, places: Tensor, count: int, fetch: Fetch) -> tuple[Tensor, int]:
        """The slots of ``places`` [n], all of which are here then, and how many were not."""
        if self._slot_of is None:
            self._begin(places, count)
        assert self._slot_of is not None
        self._calls += 1
        slots = self._slot_of.index_select(0, places).long()
        missing = (slots < 0).nonzero()[:, 0]
        self._used[slots.where(slots >= 0, self.slots)] = self._calls
        if len(missing):
            new = places.index_select(0, missing)
            slots[missing] = self._take_in(new, fetch(new))
        return slots, len(missing)

    def _begin(self, like: Tensor, count: int) -> None:
        with torch.inference_mode(False):
            self.slots = min(self.slots, count)
            none = torch.zeros(0, dtype=torch.int32, device=like.device)
            self._slot_of = none.new_full((count + 1,), -1)
            self._place_of = none.new_full((self.slots,), count)  # nobody's
            self._used = none.new_zeros(self.slots + 1)  # by slot, the call that used it last
        self._parts, self._calls = [], 0

    def _take_in(self, places: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """Put new rows into the slots that were used least lately. Returns the slots [n]."""
        slot_of, place_of = self._slot_of, self._place_of
        assert slot_of is not None
        if not self._parts:
            with torch.inference_mode(False):
                self._parts = [x.new_empty(self.slots, x.shape[1]) for x in rows]
        slots = self._used[: self.slots].topk(len(places), largest=False).indices
        left = place_of[slots].long()
        # a place that was asked for twice in one call has two slots, and is found by one of them
        slot_of[left.where(slot_of[left] == slots, len(slot_of) - 1)] = -1
        slot_of[places] = slots.int()
        place_of[slots], self._used[slots] = places.int(), self._calls
        for part, new in zip(self._parts, rows, strict=True):
            part[slots] = new
        return slots


def check_cached(tier: str, each: int) -> None:
    """Raise SpecError where ``each`` is no number of slots for a list of rows."""
    if each < 0:
        raise SpecError(f"{tier} keeps cached = 0 rows or more of each KV head on the GPU; got {each}.")
