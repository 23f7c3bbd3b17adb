"""Sparse Transformers' strided pattern: the last keys, and every l-th key before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..method import AttentionMethod
from ..selection import Band, Bands, Index
from .banded import banded_tokens


@dataclass(frozen=True, kw_only=True)
class Strided(AttentionMethod):
    """The last w keys, and every l-th key before them: the strided pattern of Sparse Transformers
    (1904.10509), both of its parts in each head, at stride l = ``stride``.

        w = 3, stride = 4      key   0 1 2 3 4 5 6 7 8 9
                         query 9     . x . . . x . x x x

    Query i reads j where i - j < w or (i - j) mod l = 0; with ``reach``, only where i - j < reach; besides,
    the first ``sinks`` keys of its row, 0 in the paper, which takes w = l. MInference's strided baseline
    (2407.02490) is w=2048,stride=2,reach=6144,sinks=1024.
    """

    name: ClassVar[str] = "strided"
    title: ClassVar[str] = "Strided sparse attention (Sparse Transformers)"
    paper: ClassVar[str] = "1904.10509"

    w: int = 128
    stride: int = 128
    reach: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        require(self, w=(1, None), stride=(1, None), reach=(1, None), sinks=(0, None))
        if self.reach is not None and self.reach < self.w:
            raise SpecError(f"strided takes a reach of at least w; got reach={self.reach}, w={self.w}.")

    @property
    def bands(self) -> Bands:
        """The distances: the window, and the multiples of the stride beyond it."""
        beyond = -(-self.w // self.stride) * self.stride
        return Bands(bands=(Band(1, 0, self.w), Band(self.stride, beyond, self.reach)), sinks=self.sinks)

    def reads(self, queries: Queries) -> Cost:
        reach = None if self.reach is None else self.reach + self.sinks
        return queries.cost(self.bands.count(queries.seen), reach=reach)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return None if keys.longest() <= self.w + self.sinks else self.bands

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return None if keys.longest() <= self.w + self.sinks else banded_tokens(self.bands, keys)
