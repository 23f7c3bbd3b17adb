"""The ceiling of block-sparse prefill: blocks chosen by the attention that they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..block_shares import block_shares
from ..blocks import Grid, covering
from ..checks import require
from ..cost import Cost, Queries
from ..gqa import reduce_group
from ..keys import Keys
from ..lookahead import Lookahead
from ..method import AttentionMethod
from ..needs import Needs
from ..selection import Index


@dataclass(frozen=True, kw_only=True)
class Oracle(AttentionMethod):
    """Each block of queries reads the key blocks that hold most of its true attention.

    The true share of a block is the softmax over all visible keys, summed over its keys and over the queries
    of the query block. The blocks that the queries lie in are always read. The largest others follow, until
    ``mass`` of the total is held, or k tokens or a ``fraction`` of the visible ones are read, whichever comes
    first. No other choice of as many blocks of this size holds more attention. The shares cost what dense
    attention costs, so this method measures other methods and saves nothing itself. ``gqa_reduce``: "none",
    each head selects alone, or one selection for a group by the "sum" or the "max" of its heads' shares.
    Decode is dense.
    """

    name: ClassVar[str] = "oracle"
    title: ClassVar[str] = "Oracle (true block masses)"
    paper: ClassVar[str] = ""

    mass: float | None = 0.9
    k: int | None = None
    fraction: float | None = None
    block: int = 64
    gqa_reduce: str = "none"

    def __post_init__(self) -> None:
        require(self, mass=(1e-6, 1.0), k=(1, None), fraction=(1e-6, 1.0), block=(1, None))
        require(self, gqa_reduce=("sum", "max", "none"))

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.of_block(self.block)

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    @property
    def block_multiple(self) -> int:
        return self.block

    def reads(self, queries: Queries) -> Cost:
        if self._covers(queries.length):
            return queries.cost()
        own = (queries.seen - 1) // self.block
        keys = queries.of_blocks(self._size(own, queries.length), own, own, self.block)
        exact = self.mass in (None, 1)
        return queries.cost(keys, selection=queries.raw_keys(queries.length), exact=exact)

    def _covers(self, length: int) -> bool:
        whole = (self.mass or 1.0) == (self.fraction or 1.0) == 1
        return length <= self.block or (whole and (self.k is None or self.k >= length))

    def _size(self, last: Tensor, length: int) -> Tensor:
        """Blocks that a query block reads at most whose last key block is ``last``."""
        k = length if self.k is None else self.k
        return ((last + 1) * (self.fraction or 1.0)).round().long().clamp(max=-(-k // self.block))

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if self._covers(keys.length):
            return None
        grid = Grid.of(keys, self.block, self.block)
        seen = torch.arange(keys.past, keys.length) + 1
        k, block = keys.read_all_keys(), self.block
        shares = block_shares(q, k, seen, block, block, keys.softmax)
        shares = reduce_group(shares, self.gqa_reduce)  # [1, Hs, Nq, Nk]
        forced = grid.between(grid.first, grid.last)
        size = self._size(grid.last, keys.length)
        if self.mass is not None and self.mass < 1:
            size = torch.minimum(size, covering(shares, forced, self.mass))
        return grid.choose(shares.masked_fill(grid.cols > grid.last[:, None], -torch.inf), forced, size)
