"""StreamingLLM's pattern: the last keys and the first ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..checks import require
from ..cost import Cost, Queries
from ..keys import Keys
from ..method import AttentionMethod
from ..ops.decode import decode
from ..partial import Partial
from ..selection import Index, Window
from ..softmax import Softmax
from ..static_step import EveryKeyStep, StaticKeys, StaticStep, store


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(AttentionMethod):
    """The last w keys and the first ``sinks`` keys of each row: StreamingLLM's pattern (2309.17453) on an
    unevicted cache.

    Positions are the tokens' own; nothing is evicted, so a later method or a crop finds every key in place.
    """

    name: ClassVar[str] = "window"
    title: ClassVar[str] = "Sliding window with attention sinks (StreamingLLM)"
    paper: ClassVar[str] = "2309.17453"

    w: int = 1024
    sinks: int = 4

    def __post_init__(self) -> None:
        require(self, w=(1, None), sinks=(0, None))

    def reads(self, queries: Queries) -> Cost:
        return queries.cost(queries.seen.clamp(max=self.w + self.sinks), reach=self.w + self.sinks)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def static_step(self, keys: StaticKeys) -> StaticStep | None:
        if max(keys.seen()) <= self.w + self.sinks:
            return EveryKeyStep()
        return WindowStep(w=self.w, sinks=self.sinks)

    def _select(self, keys: Keys) -> Index:
        return None if keys.longest() <= self.w + self.sinks else Window(size=self.w, sinks=self.sinks)


@dataclass(frozen=True, kw_only=True)
class WindowStep(StaticStep):
    """The step of ``window`` where it leaves keys out."""

    name: ClassVar[str] = "window"

    w: int
    sinks: int

    def run(self, q: Tensor, keys: StaticKeys, softmax: Softmax) -> Partial:
        store(keys)
        where: dict[str, Any] = {"start": keys.start, "length": keys.length, "impl": keys.impl}
        return decode(q, keys.buffers, softmax, window=self.w, sinks=self.sinks, **where)

    def read(self, seen: int) -> int:
        return min(seen, self.w + self.sinks)
