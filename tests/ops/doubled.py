"""A toy format of stored keys: doubled, with the factor that undoes it beside each key. Values are plain.

Doubling and halving round nothing, so that whatever runs on this format gives the bits of the plain one. This
file and its load function (load_doubled.py) are all that the format consists of.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor

from farspan.attention.kv import KV


class Doubled(KV):
    """stored: 2 k [B, Hkv, T, D], the factor 1/2 [B, Hkv, T, 1], v [B, Hkv, T, Dv]."""

    __slots__ = ()
    format = "doubled"
    key_parts = 2

    @classmethod
    def encode(cls, k: Tensor, v: Tensor) -> Self:
        return cls(2 * k, k.new_full((*k.shape[:3], 1), 0.5), v)

    @property
    def k(self) -> Tensor:
        return self.stored[0] * self.stored[1]

    @property
    def v(self) -> Tensor:
        return self.stored[2]

    @staticmethod
    def load_function() -> Any:
        from .load_doubled import load_doubled

        return load_doubled
