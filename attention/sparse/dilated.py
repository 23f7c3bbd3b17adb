"""Dilated neighbourhood attention: every d-th of the last keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import require
from ..cost import Cost, Queries
from ..keys import Keys
from ..method import AttentionMethod
from ..selection import Band, Bands, Index
from .banded import banded_tokens


@dataclass(frozen=True, kw_only=True)
class Dilated(AttentionMethod):
    """Every d-th of the last keys, w of them: dilated neighbourhood attention (2209.15001) in its causal 1-D
    form (2403.04690), at dilation d = ``dilation``.

        w = 3, dilation = 2      key   0 1 2 3 4 5 6 7
                           query 7     . . . x . x . x

    Query i reads i, i - d, .., i - (w - 1) d, as far as there are keys; besides, the first ``sinks`` keys of
    its row, 0 in the papers. The defaults are the dilated baseline of MInference (2407.02490). With
    dilation > 1 no w reads everything.
    """

    name: ClassVar[str] = "dilated"
    title: ClassVar[str] = "Dilated neighbourhood attention, causal"
    paper: ClassVar[str] = "2209.15001"

    w: int = 4096
    dilation: int = 2
    sinks: int = 1024

    def __post_init__(self) -> None:
        require(self, w=(1, None), dilation=(1, None), sinks=(0, None))

    @property
    def bands(self) -> Bands:
        """The distances."""
        return Bands(bands=(Band(self.dilation, 0, self.w * self.dilation),), sinks=self.sinks)

    def reads(self, queries: Queries) -> Cost:
        return queries.cost(self.bands.count(queries.seen), reach=self.w * self.dilation + self.sinks)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return None if self._covers(keys) else self.bands

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return None if self._covers(keys) else banded_tokens(self.bands, keys)

    def _covers(self, keys: Keys) -> bool:
        near = self.w if self.dilation == 1 else 1
        return keys.longest() <= near + self.sinks
