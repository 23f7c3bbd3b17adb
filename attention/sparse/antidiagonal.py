"""XAttention: blocks chosen by sums of logits along antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..block_shares import antidiagonal_shares
from ..blocks import Grid, covered
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..gqa import reduce_group
from ..keys import Keys
from ..lookahead import Lookahead
from ..method import AttentionMethod
from ..needs import Needs
from ..selection import Index


@dataclass(frozen=True, kw_only=True)
class Antidiagonal(AttentionMethod):
    """The blocks that hold most of an attention map, estimated from its antidiagonals (XAttention,
    2503.16428).

    ``antidiagonal_shares`` gives each block of ``block`` keys its share, with tiles of S = ``stride`` queries
    and keys; a tile of queries sees the tiles of keys that begin no later than itself. The first key block
    and the query block's own are always read. Those with the largest shares follow until ``mass`` (the
    paper's tau) of the total is reached. ``gqa_reduce``: "none", each head selects alone as in the paper, or
    one selection for a group by the "sum" or the "max" of its heads' shares.

    The sums need every number of every key, and no summary smaller than the keys gives them: raw keys are
    read, S times less often than by attention itself. Decode is dense.
    """

    name: ClassVar[str] = "antidiagonal"
    title: ClassVar[str] = "XAttention (antidiagonal scoring)"
    paper: ClassVar[str] = "2503.16428"

    mass: float = 0.9
    stride: int = 16
    block: int = 128
    gqa_reduce: str = "none"

    def __post_init__(self) -> None:
        require(self, mass=(1e-6, 1.0), stride=(1, None), block=(1, None), gqa_reduce=("sum", "max", "none"))
        if self.block % self.stride:
            raise SpecError(
                f"antidiagonal takes a block of whole strides; got block={self.block}, stride={self.stride}."
            )

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
        return queries.cost(selection=queries.raw_keys(queries.length), exact=False)

    def _covers(self, length: int) -> bool:
        return self.mass == 1 or length <= self.block

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if self._covers(keys.length):
            return None
        grid = Grid.of(keys, self.block, self.block)
        seen = torch.arange(keys.past, keys.length, self.stride) // self.stride + 1
        k = keys.read_all_keys()
        shares = antidiagonal_shares(q, k, seen, self.stride, self.block, keys.softmax)
        shares = reduce_group(shares, self.gqa_reduce)
        forced = grid.between(grid.first, grid.last) | (grid.cols == 0)
        return grid.read(covered(shares, forced, self.mass))
