"""Static patterns: the keys read depend on positions alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..index import Index, Window
from ..keys import Keys
from ..method import DECODE, PREFILL, AttentionMethod, require


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(AttentionMethod):
    """The last w keys and the first ``sinks`` keys of each row: StreamingLLM's pattern (2309.17453) on an
    unevicted cache.

    Positions are the tokens' own; nothing is evicted, so a later method or a crop finds every key in place.
    """

    name: ClassVar[str] = "window"
    title: ClassVar[str] = "Sliding window with attention sinks (StreamingLLM)"
    family: ClassVar[str] = "sparse"
    paper: ClassVar[str] = "2309.17453"
    phases: ClassVar[frozenset[str]] = frozenset({PREFILL, DECODE})

    w: int = 1024
    sinks: int = 4

    def __post_init__(self) -> None:
        require(self, w=(1, None), sinks=(0, None))

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def _select(self, keys: Keys) -> Index:
        return None if keys.longest() <= self.w + self.sinks else Window(size=self.w, sinks=self.sinks)
