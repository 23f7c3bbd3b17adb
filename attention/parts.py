"""Keys and values of a layer whose KV heads hold different numbers of keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .errors import FarspanError
from .kv import KV


class Part(NamedTuple):
    """Some KV heads of a layer.

    kv: [B, len(heads), N], the keys and values that these heads have; those of each row come last. evicted:
    by row, how many of its keys they have no more; None: they have all of them.
    """

    heads: tuple[int, ...]
    kv: KV
    evicted: Sequence[int] | None


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
        parts = [(heads, kv[rows], None if gone is None else gone[rows]) for heads, kv, gone in self.parts]
        return type(self)([Part(*part) for part in parts], self.positions)

    def row(self, b: int, first: int, end: int) -> PartedKV:
        """The positions first .. end - 1 of row b, which begins at ``first``."""
        parts = []
        for part in self.parts:
            n, gone = part.kv.length, 0 if part.evicted is None else part.evicted[b]
            low, high = n - (self.positions - first - gone), n - (self.positions - end)
            parts.append(Part(part.heads, part.kv[b : b + 1, :, low:high], (gone,)))
        return PartedKV(parts, end - first)

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
