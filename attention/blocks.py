"""Query blocks of a call among the blocks of its keys: what methods that select blocks have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .budget import select_topk
from .keys import Keys
from .ops.select import by_mass, by_threshold
from .ops.sums import running_sum
from .selection import BlockIndex


class Grid(NamedTuple):
    """Where the query blocks of a call stand among the key blocks.

    begin, end [Nq]: the positions of the first query of each query block, and after its last. first, last
    [Nq]: the first and the last key block that its queries are in. cols [Nk]: the numbers of all key blocks.
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
        self, ranked: Tensor, forced: Tensor, size: int | Tensor, max_blocks: int | None = None
    ) -> BlockIndex:
        """The blocks in ``forced`` [Nq, Nk], and those that rank highest in ``ranked`` [B, Hs, Nq, Nk] (-inf:
        not a candidate), ``size`` blocks in all, one number or one per row. max_blocks: an upper bound of the
        blocks of a row, where it is known without waiting for the device."""
        least = forced.sum(-1)
        size = least.clamp(min=size) if isinstance(size, int) else torch.maximum(size, least)
        size = size.expand(ranked.shape[:3])
        blocks, counts = select_topk(
            ranked.masked_fill(forced, torch.inf),
            size,
            min(max_blocks or ranked.shape[3], ranked.shape[3]),
        )
        assert counts is not None
        return BlockIndex(blocks=blocks.int(), counts=counts, block_q=self.block_q, block_k=self.block_k)

    def read(self, mask: Tensor) -> BlockIndex:
        """The blocks in ``mask`` [B, Hs, Nq, Nk] bool. Nothing waits for the device."""
        return index_of(mask, self.block_q, self.block_k)


def index_of(mask: Tensor, block_q: int, block_k: int, key_order: Tensor | None = None) -> BlockIndex:
    """The blocks in ``mask`` [B, Hs, Nq, Nk] bool, of keys in the order ``key_order`` [B, Hs, Tk]. Nothing
    waits for the device: there, the lists are as wide as the mask."""
    most = None if mask.device.type == "cpu" else mask.shape[-1]
    blocks, counts = by_threshold(mask.float(), 0.5, most=most)
    return BlockIndex(
        blocks=blocks.int(), counts=counts, block_q=block_q, block_k=block_k, key_order=key_order
    )


def covering(shares: Tensor, forced: Tensor, mass: float) -> Tensor:
    """The number of blocks [...] that hold ``mass`` of the sum of each row of shares [..., Nk] (>= 0). All
    blocks in ``forced`` [Nq, Nk] are counted first, then the largest others; a block with a share of 0 is not
    counted."""
    return forced.sum(-1) + _largest(shares, forced, mass)[0].sum(-1)


def covered(shares: Tensor, forced: Tensor, mass: float) -> Tensor:
    """The blocks that ``covering`` counts, [..., Nk] bool; of equal shares the first blocks. One sort."""
    counted, order = _largest(shares, forced, mass)
    return torch.zeros_like(counted).scatter_(-1, order, counted) | forced


def _largest(shares: Tensor, forced: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """(counted [..., Nk] bool, order [..., Nk]): the blocks in the order of their shares, those in ``forced``
    as if they had none, and which of them are needed, besides those in ``forced``, for ``mass``."""
    taken = shares.masked_fill(~forced, 0).sum(-1, keepdim=True)
    rest, order = shares.masked_fill(forced, 0).sort(dim=-1, descending=True, stable=True)
    before = taken + running_sum(rest) - rest
    goal = mass * shares.sum(-1, keepdim=True)
    return (before < goal) & (rest > 0), order


def holding(shares: Tensor, mass: float, n: int) -> Tensor:
    """[..., n] bool: the fewest of shares [..., N] (>= 0) that hold ``mass`` of their sum; N is at most n.
    Nothing waits for the device."""
    most = None if shares.device.type == "cpu" else shares.shape[-1]
    return marked(*by_mass(shares, mass, most=most), n)


def marked(chosen: Tensor, counts: Tensor, n: int) -> Tensor:
    """[..., n] bool: the first ``counts`` [...] of the places ``chosen`` [..., M]."""
    used = torch.arange(chosen.shape[-1], device=chosen.device) < counts[..., None]
    mask = torch.zeros(*chosen.shape[:-1], n + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(-1, torch.where(used, chosen, n), True)[..., :n]  # place n takes the others
