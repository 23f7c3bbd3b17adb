"""Attention in which some keys keep only part of their share: those keys and the others are attended to apart
and merged with other weights (ACT, 2406.15765)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..keys import Keys
from ..kv import KV
from ..ops import kernel
from ..ops.block_sparse import block_sparse
from ..ops.flash import flash
from ..partial import Partial, empty_partial, merge
from ..softmax import Softmax
from .base import Pairs, Selection
from .blocks import BlockIndex
from .every import EveryKey, every_pair

_PAIRS = 1 << 22  # of query and key that are masked at a time


@dataclass(frozen=True, kw_only=True)
class Rescaled(Selection):
    """The keys of ``read`` (None: every visible key), some of them with another weight.

    ``keys`` [B, H, Tk] (bool, of each query head) keep ``factor`` (0 to 1) of their share of each query's
    attention. The shares of the other keys that the query reads grow in proportion, so that the sum stays 1.
    Where there are no other keys, ``keys`` keep all of it.
    """

    called: ClassVar[str] = "Rescaled"

    read: BlockIndex | None
    keys: Tensor
    factor: float

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        part = attend_rescaled(q, keys, self, impl)
        if self.read is None:
            return part, every_pair(q, keys, rows)
        return part, self.read.head_pairs(q, keys, rows)

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        return (self.read or EveryKey()).needed(chunk, starts, kv_heads, device)

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        """As ``Selection.to_mask``, [B, 1 | Hs, Tq, Tk]: the mask of ``read``."""
        return (self.read or EveryKey()).to_mask(tq, tk, start, batch, rows)

    @property
    def mask_heads(self) -> int:
        return 1 if self.read is None else self.read.mask_heads

    @property
    def reads_every_key(self) -> bool:
        return self.read is None


def attend_rescaled(q: Tensor, keys: Keys, index: Rescaled, impl: str) -> Partial:
    """Attention of prefill queries q [B, H, Tq, D], whose rows are not padded, with the weights of ``index``.
    lse is that of the keys read, without their rescaling.

    With S the keys to be scaled by f and R the others that a query reads, exp(lse) = exp(lse_R) + exp(lse_S)
    stays, and

        lse_S' = lse_S + log f      lse_R' = log(exp(lse_R) + (1 - f) exp(lse_S))

    give S the share f m where it had m, and R the rest. R is attended to by itself: nothing is subtracted, so
    nothing is lost where m is near 1.
    """
    softmax = keys.softmax
    group = q.shape[1] // keys.kv.num_kv_heads
    result = empty_partial(q, keys.kv.value_dim)
    for b in range(q.shape[0]):
        scaled = index.keys[b, :, : keys.length]
        some = scaled.any(1)
        plain = (~some).nonzero()[:, 0]
        todo: list[tuple[Tensor, Tensor | None]] = [(plain, None)] if len(plain) else []
        todo += [(h[None], scaled[h]) for h in some.nonzero()[:, 0]]
        for heads, few in todo:
            mine = q[b : b + 1, heads], keys.kv[b : b + 1, heads // group]
            read = None if index.read is None else of_heads(index.read, b, heads, q.shape[1])
            if few is not None:
                part = _calibrated(*mine, few, read, index.factor, impl, softmax)
            elif read is None:
                part = flash(*mine, softmax, impl=impl)
            else:
                part = block_sparse(*mine, read, softmax, check=False, impl=impl)
            result.out[b, heads] = part.out[0].to(result.out.dtype)
            result.lse[b, heads] = part.lse[0].to(result.lse.dtype)
    return result


def of_heads(index: BlockIndex, b: int, heads: Tensor, num_heads: int) -> BlockIndex:
    """The part of ``index`` that names what query heads ``heads`` [n], out of ``num_heads``, of row b read:
    an index of one row and n heads."""
    mine = heads * index.blocks.shape[1] // num_heads
    return replace(index, blocks=index.blocks[b : b + 1, mine], counts=index.counts[b : b + 1, mine])


class HeadReads(NamedTuple):
    """Which keys one head reads in a call whose first query is at position ``past``: the key ``blocks`` [Nq,
    Nk] (bool) of each query block, or every visible key where that is None."""

    past: int
    blocks: Tensor | None = None
    block_q: int = 1
    block_k: int = 1

    @staticmethod
    def of(index: BlockIndex, past: int, length: int) -> HeadReads:
        """The reads of an index of one row and one head, among ``length`` keys."""
        count = -(-length // index.block_k)
        used = torch.arange(index.blocks.shape[3], device=index.blocks.device) < index.counts[0, 0, :, None]
        blocks = torch.zeros(used.shape[0], count + 1, dtype=torch.bool, device=used.device)
        blocks.scatter_(1, torch.where(used, index.blocks[0, 0].long(), count), True)
        return HeadReads(past, blocks[:, :count], index.block_q, index.block_k)

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """[R, C] bool: which of the keys at ``columns`` [C] the queries at positions ``rows`` [R] read."""
        seen = columns <= rows[:, None]
        if self.blocks is None:
            return seen
        return seen & self.blocks[(rows - self.past) // self.block_q][:, columns // self.block_k]


def _calibrated(
    q: Tensor,
    kv: KV,
    scaled: Tensor,
    read: BlockIndex | None,
    factor: float,
    impl: str,
    softmax: Softmax,
) -> Partial:
    """One head, q [1, 1, Tq, D], kv [1, 1, Tk], whose keys ``scaled`` [Tk] are scaled."""
    if read is None:
        rest, less = _apart(q, kv, scaled, impl, softmax)
    else:
        rest, less = _apart_in_blocks(q, kv, scaled, read, impl, softmax)
    alone = rest.lse == -torch.inf
    freed = torch.logaddexp(rest.lse, less.lse + _log(1 - factor)).masked_fill(alone, -torch.inf)
    kept = torch.where(alone, less.lse, less.lse + _log(factor))
    return merge(Partial(rest.out, freed), Partial(less.out, kept))


def _apart(q: Tensor, kv: KV, scaled: Tensor, impl: str, softmax: Softmax) -> tuple[Partial, Partial]:
    """Dense attention over the other keys and over the scaled ones.

    Without the scaled positions, queries and keys alike, what is left is causal attention of a shorter
    sequence; the queries at those positions, as few as they are, come on their own.
    """
    past, device = kv.length - q.shape[2], q.device
    rows = torch.arange(past, kv.length, device=device)
    few, other = (x.nonzero()[:, 0] for x in (scaled, ~scaled))
    rest = empty_partial(q, kv.value_dim)
    others = kv[:, :, other]
    mine = (~scaled[past:]).nonzero()[:, 0]
    if len(mine):
        part = flash(q[:, :, mine], others, softmax, impl=impl)
        rest.out[:, :, mine], rest.lse[:, :, mine] = part.out.to(q.dtype), part.lse.to(rest.lse.dtype)
    if len(theirs := scaled[past:].nonzero()[:, 0]):
        part = _masked(q[:, :, theirs], others, rows[theirs], other, HeadReads(past), softmax)
        rest.out[:, :, theirs], rest.lse[:, :, theirs] = part.out.to(q.dtype), part.lse.to(rest.lse.dtype)
    return rest, _masked(q, kv[:, :, few], rows, few, HeadReads(past), softmax)


def _apart_in_blocks(
    q: Tensor, kv: KV, scaled: Tensor, read: BlockIndex, impl: str, softmax: Softmax
) -> tuple[Partial, Partial]:
    """Attention over the other keys and over the scaled ones that ``read`` names. Blocks without a scaled key
    are read by block_sparse, the keys of the other blocks one by one."""
    length, past, size = kv.length, kv.length - q.shape[2], read.block_k
    mine = HeadReads.of(read, past, length)
    blocks = mine.blocks
    assert blocks is not None
    mixed = pad(scaled, (0, -length % size)).unflatten(0, (-1, size)).any(1)
    whole = blocks & ~mixed
    counts = whole.sum(1)
    chosen = (~whole).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(counts.max()))]
    index = replace(read, blocks=chosen.int()[None, None], counts=counts.int()[None, None])
    parts = [block_sparse(q, kv, index, softmax, check=False, impl=impl)]
    rows = torch.arange(past, length, device=q.device)
    # Some query must read a key for it to be looked at.
    last = (blocks * torch.arange(1, len(blocks) + 1, device=q.device)[:, None]).amax(0) * read.block_q + past
    columns = torch.arange(length, device=q.device)
    columns = columns[(mixed & blocks.any(0))[columns // size] & (columns < last[columns // size])]
    for some in (columns[~scaled[columns]], columns[scaled[columns]]):
        parts.append(_masked(q, kv[:, :, some], rows, some, mine, softmax))
    return merge(*parts[:2]), parts[2]


def _masked(q: Tensor, kv: KV, rows: Tensor, columns: Tensor, read: HeadReads, softmax: Softmax) -> Partial:
    """Queries at positions ``rows`` over the keys at ``columns``, as far as they read them."""
    parts, tile = [], max(1, _PAIRS // max(1, len(columns)))
    for a in range(0, len(rows), tile):
        mask = read.pairs(rows[a : a + tile], columns)[None, None]
        parts.append(kernel.attend(q[:, :, a : a + tile], kv, softmax, mask=mask))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
