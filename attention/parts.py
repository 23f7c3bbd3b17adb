"""Keys and values of a layer whose KV heads hold different numbers of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .errors import FarspanError
from .kv import KV


@dataclass(frozen=True)
class Evicted:
    """How many of their keys the rows have lost. counts: by row. there: [B], the same on the device; None
    where no row is padded, so that all have lost as many."""

    counts: list[int]
    there: Tensor | None

    def moved(
        self, starts: list[int] | None, start: Tensor | None, gone: int
    ) -> tuple[list[int] | None, Tensor | None]:
        """Where rows begin that began at ``starts``, on the host and on the device, if positions count over
        the keys that are left and are ``gone`` lower. None: no row is padded."""
        pairs = zip(starts or [0] * len(self.counts), self.counts, strict=True)
        firsts = [first + lost - gone for first, lost in pairs]
        if not any(firsts):
            return None, None
        assert start is not None and self.there is not None, "the rows were padded when keys were evicted"
        return firsts, start + self.there - gone

    def rows(self, rows: slice) -> Evicted:
        """That of some rows."""
        return Evicted(self.counts[rows], None if self.there is None else self.there[rows])


class Part(NamedTuple):
    """Some KV heads of a layer.

    kv: [B, len(heads), N], the keys and values that these heads have; those of each row come last. evicted:
    how many they have no more; None: they have all of them.
    """

    heads: tuple[int, ...]
    kv: KV
    evicted: Evicted | None


def of_heads(kv: KV, heads: Sequence[int]) -> KV:
    """Some KV heads of ``kv``. An index would have to be copied to the device."""
    first, count = (heads[0] if heads else 0), len(heads)
    if tuple(heads) == tuple(range(first, first + count)):
        return kv[:, first : first + count]
    return kv.map(lambda x: torch.cat([x[:, head : head + 1] for head in heads], 1))


class PartedKV(KV):
    """Keys and values of T positions, of which some KV heads have evicted some. Operations take the ``kv`` of
    one part at a time."""

    __slots__ = ("parts", "positions")

    def __init__(self, parts: Sequence[Part], positions: int) -> None:
        super().__init__(*chain(*[part.kv.stored for part in parts]))
        self.parts, self.positions = tuple(parts), positions

    def __getitem__(self, index: Any) -> Self:
        """The rows ``index``, a slice."""
        rows: slice = index
        parts = [Part(x.heads, x.kv[rows], x.evicted and x.evicted.rows(rows)) for x in self.parts]
        return type(self)(parts, self.positions)

    def row(self, b: int, first: int, end: int) -> PartedKV:
        """The positions first .. end - 1 of row b, which begins at ``first``."""
        parts = []
        for part in self.parts:
            gone = None if part.evicted is None else part.evicted.rows(slice(b, b + 1))
            n, lost = part.kv.length, 0 if gone is None else gone.counts[0]
            low, high = n - (self.positions - first - lost), n - (self.positions - end)
            parts.append(Part(part.heads, part.kv[b : b + 1, :, low:high], gone))
        return PartedKV(parts, end - first)

    @property
    def evicting(self) -> tuple[int, ...]:
        """The KV heads that evict."""
        return next(part.heads for part in self.parts if part.evicted is not None)

    @property
    def k(self) -> Tensor:
        raise _refusal()

    @property
    def v(self) -> Tensor:
        raise _refusal()

    @property
    def num_kv_heads(self) -> int:
        return sum([len(part.heads) for part in self.parts])

    @property
    def length(self) -> int:
        return self.positions

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, self.num_kv_heads, self.positions))

    @property
    def key_nbytes(self) -> int:
        return sum([part.kv.key_nbytes for part in self.parts])

    @property
    def row_nbytes(self) -> int:
        return self.parts[0].kv.row_nbytes


def _refusal() -> FarspanError:
    return FarspanError(
        "The KV heads of this layer hold different keys, so these are no single tensor: use the cache with "
        "the method that has filled it."
    )
