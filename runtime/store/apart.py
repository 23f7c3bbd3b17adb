"""KV heads of a layer that have keys of their own, since a method has evicted some of theirs."""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

from ...attention.kv import KV
from ...attention.parts import Evicted, Part


class _Store(Protocol):
    """What is read of a store."""

    evicted: Evicted | None

    @property
    def kv(self) -> KV | None: ...


S = TypeVar("S", bound=_Store)


class Apart(NamedTuple, Generic[S]):
    """The KV heads whose keys are in ``store``, and the others."""

    heads: list[int]
    others: list[int]
    store: S

    def parts(self, kv: KV) -> list[Part]:
        """``kv``, the keys and values of the others, if there are any, beside those of ``store``."""
        own = self.store.kv
        assert own is not None
        apart = Part(tuple(self.heads), own, self.store.evicted)
        return [Part(tuple(self.others), kv, None), apart] if self.others else [apart]
