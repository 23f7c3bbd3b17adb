"""The ceiling of block-sparse prefill: blocks chosen by the attention they really hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import Grid, covering
from ..cost import Cost, Queries
from ..gqa import reduce_group
from ..index import Index
from ..keys import Keys
from ..method import AttentionMethod, require
from ..ops.scores import scores

_TILE = {"cpu": 1 << 22, "cuda": 1 << 27}  # probabilities held at a time


@dataclass(frozen=True, kw_only=True)
class Oracle(AttentionMethod):
    """Each block of queries reads the key blocks that hold most of its true attention.

    The true share of a block is the softmax over all visible keys, summed over its keys and over the queries
    of the query block. Read are those the queries lie in, and then the largest, until they hold ``mass`` of
    the total or are k tokens or a ``fraction`` of the visible ones, whatever of these is given and comes
    first. No selection of as many blocks of this size, these among them, holds more attention. To know it
    costs what dense attention costs: this is a measure for other methods, not one of them. ``gqa_reduce``:
    "none", each head for itself, or one set for a group by the "sum" or the "max" of its heads' shares.
    Decode is dense.
    """

    name: ClassVar[str] = "oracle"
    title: ClassVar[str] = "Oracle (true block masses)"
    paper: ClassVar[str] = ""
    lookahead: ClassVar[str] = "block - 1"
    reads_keys: ClassVar[bool] = True

    mass: float | None = 0.9
    k: int | None = None
    fraction: float | None = None
    block: int = 64
    gqa_reduce: str = "none"

    def __post_init__(self) -> None:
        require(self, mass=(1e-6, 1.0), k=(1, None), fraction=(1e-6, 1.0), block=(1, None))
        require(self, gqa_reduce=("sum", "max", "none"))

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
        shares = reduce_group(self._shares(q, keys, grid), self.gqa_reduce)  # [1, Hs, Nq, Nk]
        forced = grid.between(grid.first, grid.last)
        size = self._size(grid.last, keys.length)
        if self.mass is not None and self.mass < 1:
            size = torch.minimum(size, covering(shares, forced, self.mass))
        return grid.choose(shares.masked_fill(grid.cols > grid.last[:, None], -torch.inf), forced, size)

    def _shares(self, q: Tensor, keys: Keys, grid: Grid) -> Tensor:
        """[1, Hkv, G, Nq, Nk]: the attention that each query block pays each key block, of as much as it has
        queries."""
        k, block, length = keys.read_all_keys(), self.block, keys.length
        nk, cols = len(grid.cols), torch.arange(length, device=q.device)
        most = _TILE.get(q.device.type, _TILE["cpu"])
        step = block * max(1, most // (q.shape[1] * block * length))
        tiles = []
        for a in range(0, q.shape[2], step):
            rows = torch.arange(keys.past + a, min(keys.past + a + step, length), device=q.device)
            seen = keys.past + a + len(rows)
            logits = scores(q[:, :, a : a + step], k[:, :, :seen], keys.softmax)
            share = torch.softmax(logits.masked_fill_(cols[:seen] > rows[:, None], -torch.inf), -1)
            share = pad(share, (0, nk * block - seen, 0, -len(rows) % block))
            tiles.append(share.unflatten(4, (nk, block)).sum(5).unflatten(3, (-1, block)).sum(4))
        return torch.cat(tiles, 3)
