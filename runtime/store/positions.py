"""The position ids by which a store's keys were rotated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...attention.errors import FarspanError


class Positions:
    """Position ids [B, T] of a store's keys, kept only where a method needs keys before RoPE. They take 4
    bytes for each key; keys and values of 8 heads of 128 in bfloat16 take 4,096."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None  # [B, room] int32
        self.length = 0

    def append(self, ids: Tensor, total: int) -> Tensor:
        """Store the ids [B, n] of the keys that extend the store to ``total`` positions. Ids of the same
        positions are replaced. Returns all ids [B, total].

        Raises FarspanError where earlier keys were appended without their ids.
        """
        past = total - ids.shape[1]
        if self.length < past:
            raise FarspanError(
                f"This cache holds {past} tokens from calls whose method needed no keys before RoPE, so the "
                "positions of these keys are not known: start a new cache under this patch."
            )
        if self._ids is None or self._ids.shape[1] < total:
            with torch.inference_mode(False):
                room = ids.new_empty(ids.shape[0], total + max(256, total // 8), dtype=torch.int32)
            if self._ids is not None:
                room[:, : self.length] = self._ids[:, : self.length]
            self._ids = room
        self._ids[:, past:total] = ids
        self.length = total
        return self._ids[:, :total]

    def between(self, first: int, end: int) -> Tensor:
        """The ids [B, end - first] of the keys first .. end - 1."""
        assert self._ids is not None and end <= self.length
        return self._ids[:, first:end]

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the ids."""
        return 0 if self._ids is None else self._ids.numel() * self._ids.element_size()

    def held(self) -> Tensor | None:
        """The ids [B, length] of all keys, for ``restore``; None where none are kept."""
        return None if self._ids is None else self._ids[:, : self.length]

    def restore(self, held: Tensor | None) -> None:
        """Take over the ids that other positions held."""
        self._ids, self.length = held, 0 if held is None else held.shape[1]

    def crop(self, length: int) -> None:
        """Drop the ids of keys at or after ``length``."""
        self.length = min(self.length, length)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to the batch dimension (reorder, repeat or select rows)."""
        if self._ids is not None:
            self._ids = change(self._ids)

    def clear(self) -> None:
        self._ids, self.length = None, 0
