"""Means of the columns of attention matrices: ACT finds its sinks by them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..block_maxima import BlockMaxima
from ..keys import Keys
from ..kv import KV
from ..ops.block_sparse import block_sparse
from ..ops.scores import scores
from ..ops.sums import running_sum
from ..received import attention_received
from ..selection import BlockIndex
from ..selection.rescaled import HeadReads, of_heads

_PAIRS = 1 << 22  # of query and key held at a time


def column_means(q: Tensor, keys: Keys, heads: Tensor) -> Tensor:
    """[B, n, Tk]: the mean of each column of the dense attention of query heads ``heads`` [n], over the
    queries of the call that see its key. q [B, H, Tq, D]."""
    kv = heads // (q.shape[1] // keys.kv.num_kv_heads)
    k = keys.read_all_keys()[:, kv]  # a KV head for each, since what is received is summed over its group
    own = Keys(kv=KV(k, k), tq=keys.tq, softmax=keys.softmax)
    return attention_received(q[:, heads], own, keys.length)[:, :, 0] / _queries_that_see(keys)


def column_means_of(q: Tensor, keys: Keys, heads: Tensor, index: BlockIndex, wanted: Tensor) -> Tensor:
    """``column_means`` of the attention over the keys that ``index`` names, of the columns ``wanted``
    [B, n, Tk] (bool) alone; 0 at the others."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    means = torch.zeros(wanted.shape, dtype=wide, device=q.device)
    keys.read_all_keys()
    group = q.shape[1] // keys.kv.num_kv_heads
    for b, i in wanted.any(2).nonzero().tolist():
        h = heads[i : i + 1]
        one, kv = q[b : b + 1, h], keys.kv[b : b + 1, h // group]
        mine = of_heads(index, b, h, q.shape[1])
        lse = block_sparse(one, kv, mine, keys.softmax, check=False).lse[0, 0]
        columns = wanted[b, i].nonzero()[:, 0]
        reads = HeadReads.of(mine, keys.past, keys.length)
        total = torch.zeros(len(columns), dtype=wide, device=q.device)
        for rows in _tiles(keys, len(columns)):
            logits = scores(one[:, :, rows - keys.past], kv[:, :, columns].k, keys.softmax)[0, 0, 0]
            share = (logits - lse[rows - keys.past, None]).exp()
            total += share.masked_fill(~reads.pairs(rows, columns), 0).sum(0)
        means[b, i, columns] = total / _queries_that_see(keys)[columns]
    return means


def column_bound(blocks: BlockMaxima, heads: Tensor, keys: Keys) -> Tensor:
    """[B, n, Tk]: an upper bound of ``column_means`` of query heads ``heads`` [n], where the maxima of the
    blocks are true or too high.

    It is the mean of the maxima of the blocks that the column passes, each weighted by the number of its
    queries that see the key: some of the query block that the key's own query is in, and all queries of later
    blocks. So sums from each query block to the last are enough.
    """
    maxima, block_q, block_k = blocks.log_maxima[:, heads].exp(), blocks.block_q, blocks.block_k
    device, end = maxima.device, keys.length
    begins = torch.arange(keys.past, end, block_q, device=device)
    sizes = (end - begins).clamp(max=block_q)
    later = (maxima * sizes[:, None]).flip(2).transpose(2, 3)
    after = running_sum(later).transpose(2, 3).flip(2)  # of a query block and all later ones
    after = pad(after, (0, 0, 0, 1))
    place = torch.arange(end, device=device)
    own = (place - keys.past).clamp(min=0) // block_q  # the query block that it is in, or the first
    part = begins[own] + sizes[own] - place.clamp(min=keys.past)
    col = place // block_k
    total = after[:, :, own + 1, col] + part * maxima[:, :, own, col]
    return total / _queries_that_see(keys)


def _queries_that_see(keys: Keys) -> Tensor:
    """[Tk]: the number of queries of the call that see each key."""
    return torch.arange(keys.length, 0, -1, device=keys.kv.device).clamp(max=keys.tq)


def _tiles(keys: Keys, columns: int) -> Iterator[Tensor]:
    """The positions of the call's queries, in tiles of a bounded number of pairs with ``columns`` keys."""
    step = max(1, _PAIRS // columns)
    for a in range(keys.past, keys.length, step):
        yield torch.arange(a, min(a + step, keys.length), device=keys.kv.device)
