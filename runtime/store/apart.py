"""KV heads of a layer that have keys of their own, since a method has evicted some of theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ...attention.kv import KV
from ...attention.parts import Part

if TYPE_CHECKING:
    from .store import KVStore


class Apart(NamedTuple):
    """The KV heads whose keys are in ``store``, and the others."""

    heads: list[int]
    others: list[int]
    store: KVStore

    def parts(self, kv: KV) -> list[Part]:
        """``kv``, the keys and values of the others, if there are any, beside those of ``store``."""
        own = self.store.kv
        assert own is not None
        apart = Part(tuple(self.heads), own, self.store.evicted)
        return [Part(tuple(self.others), kv, None), apart] if self.others else [apart]
