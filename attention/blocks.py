"""Query blocks of a call among the blocks of its keys: what methods that select blocks have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .budget import select_topk
from .index import BlockIndex
from .keys import Keys


class Grid(NamedTuple):
    """Where the query blocks of a call stand among the key blocks.

    begin, end [Nq]: positions of each one's first query, and after its last. first, last [Nq]: the key blocks
    that it lies in itself (off the blocks' grid one more than on it). cols [Nk]: all key blocks.
    """

    begin: Tensor
    end: Tensor
    first: Tensor
    last: Tensor
    cols: Tensor
    block_q: int
    block_k: int

    @staticmethod
    def of(keys: Keys, block_q: int, block_k: int) -> Grid:
        """The grid of one unpadded row whose query blocks are counted from the call's first query."""
        device = keys.kv.device
        begin = torch.arange(keys.past, keys.length, block_q, device=device)
        end = (begin + block_q).clamp_(max=keys.length)
        cols = torch.arange(-(-keys.length // block_k), device=device)
        return Grid(begin, end, begin // block_k, (end - 1) // block_k, cols, block_q, block_k)

    @staticmethod
    def anchored(keys: Keys, block: int) -> Grid:
        """The grid of one unpadded row whose query blocks, like its key blocks, are counted from the row's
        first position, wherever calls begin: the first query block may begin before the call."""
        device = keys.kv.device
        begin = torch.arange(keys.past // block * block, keys.length, block, device=device)
        end = (begin + block).clamp_(max=keys.length)
        cols = torch.arange(-(-keys.length // block), device=device)
        return Grid(begin, end, begin // block, begin // block, cols, block, block)

    def local(self, window: int) -> Tensor:
        """[Nq]: the first of the blocks that hold the last ``window`` keys of every query of a block."""
        return (self.begin - (window - 1)).clamp_(min=0) // self.block_k

    def between(self, first: Tensor, last: Tensor) -> Tensor:
        """[Nq, Nk] bool: the key blocks from first [Nq] to last [Nq]."""
        return (self.cols >= first[:, None]) & (self.cols <= last[:, None])

    def choose(
        self, ranked: Tensor, forced: Tensor, size: int | Tensor, most: int | None = None
    ) -> BlockIndex:
        """Those in ``forced`` [Nq, Nk] and, ranked [B, Hs, Nq, Nk] highest first (-inf: not to be had), as
        many more as make ``size``, one number or one per row. most: where it is known without asking the
        device, how many blocks a row reads at most."""
        size = torch.maximum(torch.as_tensor(size, device=ranked.device), forced.sum(-1))
        size = size.expand(ranked.shape[:3])
        blocks, counts = select_topk(
            ranked.masked_fill(forced, torch.inf), size, min(most or ranked.shape[3], ranked.shape[3])
        )
        assert counts is not None
        return BlockIndex(blocks=blocks.int(), counts=counts, block_q=self.block_q, block_k=self.block_k)


def covering(shares: Tensor, forced: Tensor, mass: float) -> Tensor:
    """How many blocks [...] hold ``mass`` of a row's total of shares [..., Nk] (>= 0) if those in ``forced``
    [Nq, Nk] are taken first, whatever they hold, and then the largest; a block without any never is."""
    taken = shares.masked_fill(~forced, 0).sum(-1, keepdim=True)
    rest = shares.masked_fill(forced, 0).sort(dim=-1, descending=True).values
    before = taken + rest.cumsum(-1) - rest
    goal = mass * shares.sum(-1, keepdim=True)
    return forced.sum(-1) + ((before < goal) & (rest > 0)).sum(-1)
