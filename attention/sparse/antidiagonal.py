"""XAttention: blocks chosen by sums of logits along antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import Grid, covering
from ..cost import Cost, Queries
from ..errors import SpecError
from ..gqa import reduce_group
from ..index import Index
from ..keys import Keys
from ..method import AttentionMethod, require
from ..ops.scores import scores

_TILE = {"cpu": 1 << 20, "cuda": 1 << 27}  # probabilities held at a time


@dataclass(frozen=True, kw_only=True)
class Antidiagonal(AttentionMethod):
    """The blocks that hold most of an attention map, told from its antidiagonals (XAttention, 2503.16428).

    A tile of S = ``stride`` queries and S keys is judged by the mean logit on its antidiagonal: its last
    query with its first key, the one before with the second, and so on, every query and every key once.

        S = 4      k 0 1 2 3
                 q 0       x
                   1     x
                   2   x
                   3 x

    Per head, softmax over the tiles that begin no later than the queries' own gives each tile its share. A
    key block of B = ``block`` has the share of its tiles, added up over the B queries of a query block. Read
    are the first key block, the query block's own, and then those with the largest shares until ``mass`` (the
    paper's tau) of the total is reached. ``gqa_reduce``: "none", each head for itself as in the paper, or one
    set for a group by the "sum" or the "max" of its heads' shares.

    The sums need every number of every key, and no summary smaller than the keys gives them: raw keys are
    read, S times less often than by attention itself. Decode is dense.
    """

    name: ClassVar[str] = "antidiagonal"
    title: ClassVar[str] = "XAttention (antidiagonal scoring)"
    paper: ClassVar[str] = "2503.16428"
    lookahead: ClassVar[str] = "block - 1"
    reads_keys: ClassVar[bool] = True

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
        shares = reduce_group(self._shares(q, keys), self.gqa_reduce)
        forced = grid.between(grid.first, grid.last) | (grid.cols == 0)
        size = covering(shares, forced, self.mass)
        return grid.choose(shares.masked_fill(grid.cols > grid.last[:, None], -torch.inf), forced, size)

    def _shares(self, q: Tensor, keys: Keys) -> Tensor:
        """Each key block's share of a query block's estimated attention, [1, Hkv, G, Nq, Nk], of a total of
        B / S per query block."""
        s, block, per = self.stride, self.block, self.block // self.stride
        k = keys.read_all_keys()
        k = pad(k, (0, 0, 0, -k.shape[2] % block)).unflatten(2, (-1, s)).flatten(3)  # [1, Hkv, Nk B / S, S D]
        # Turned round, so that a query meets the key on its antidiagonal in the same place.
        q = pad(q, (0, 0, 0, -q.shape[2] % s)).unflatten(2, (-1, s)).flip(3).flatten(3)
        starts = torch.arange(keys.past, keys.length, s, device=q.device)  # of each S queries
        cols = torch.arange(k.shape[2], device=q.device) * s
        most = _TILE.get(q.device.type, _TILE["cpu"])
        step = per * max(1, most // (q.shape[1] * per * k.shape[2]))
        tiles = []
        for a in range(0, len(starts), step):
            rows = starts[a : a + step]
            seen = (keys.past + (a + len(rows) - 1) * s) // block * per + per  # up to the end of a key block
            logits = scores(
                q[:, :, a : a + step], k[:, :, :seen], replace(keys.softmax, scale=keys.softmax.scale / s)
            )
            logits.masked_fill_(cols[:seen] > rows[:, None], -torch.inf)
            share = torch.softmax(logits, -1).unflatten(4, (-1, per)).sum(5)
            share = pad(share, (0, (k.shape[2] - seen) // per, 0, -len(rows) % per))
            tiles.append(share.unflatten(3, (-1, per)).sum(4))
        return torch.cat(tiles, 3)
