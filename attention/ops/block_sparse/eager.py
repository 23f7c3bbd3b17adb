"""``block_sparse`` as batches of the library's attention, which needs no mask for most keys.

A row of work is one query block of one head of the index: the queries of all heads that share the index row,
against the keys of its blocks. Blocks whose keys are all behind the block's first query (*early*) need no
mask, and rows with equally many of them are one call: rows by keys by numbers, all sizes equal. The other
blocks (*late*) are few where keys are in their own order, those on the diagonal; each row's are filled up to
as many as any row has, and a mask says which query sees which of their keys. Both parts are merged before
they are rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...kv import KV
from ...lists import BlockLists
from ...partial import Partial, empty_partial, merge
from ...softmax import Softmax
from .. import kernel
from ..padding import by_row

_ENTRIES = 1 << 21  # of the index, and numbers of queries, worked on at a time
_GATHERED = 1 << 20  # numbers of keys, and of values, gathered for one call


def block_sparse(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> Partial:
    starts = [0] * q.shape[0] if index.start is None else index.start.tolist()
    key_order = index.key_order

    def row(b: int, q: Tensor, kv: KV) -> Partial:
        order = None if key_order is None else key_order[b, :, starts[b] :] - starts[b]
        return _row(q, kv, index.blocks[b], index.counts[b], index, order, softmax)

    return by_row(q, kv, starts, row)


class _Keys(NamedTuple):
    """Keys and values kv [1, Hkv, Tk] of one unpadded row of the batch, and where the blocks of index heads
    lie.

    begin, end: [Hs, Nk], positions of a block's first and last key; end is Tk where the block is not full.
    order: [Hs, Nk, block_k], positions of all its keys, Tk past the end; None in natural order.
    """

    kv: KV
    begin: Tensor
    end: Tensor
    order: Tensor | None
    block_k: int

    @staticmethod
    def of(kv: KV, order: Tensor | None, hs: int, block_k: int) -> _Keys:
        tk = kv.length
        count = -(-tk // block_k)
        if order is None:
            begin = (torch.arange(count, device=kv.device) * block_k).expand(hs, -1)
            end = begin + (block_k - 1)
            return _Keys(kv, begin, end.where(end < tk, tk), None, block_k)
        order = pad(order.long(), (0, count * block_k - tk), value=tk).unflatten(1, (count, block_k))
        return _Keys(kv, order.amin(2), order.amax(2), order, block_k)

    @property
    def length(self) -> int:
        return self.kv.length

    def kv_heads(self, heads: Tensor) -> Tensor:
        """The KV heads of index heads."""
        return heads * self.kv.num_kv_heads // len(self.begin)

    def positions(self, heads: Tensor, blocks: Tensor) -> Tensor:
        """[R, C, block_k]: of the keys of blocks [R, C] of index heads [R], Tk past the end."""
        if self.order is not None:
            return self.order[heads[:, None], blocks]
        places = blocks[..., None] * self.block_k + torch.arange(self.block_k, device=blocks.device)
        return places.clamp_(max=self.length)

    def full(self, heads: Tensor, blocks: Tensor) -> KV:
        """Keys and values [R, 1, C * block_k] of full blocks [R, C] of index heads [R]."""
        away = self.kv.elsewhere is not None or self.kv.streams
        if self.order is not None or self.block_k == 1 or away:
            return self.at(heads, self.positions(heads, blocks).flatten(1))
        of, whole = self.kv_heads(heads), self.length // self.block_k

        def take(x: Tensor) -> Tensor:
            x = x[0]
            if x.is_contiguous() and x.shape[1] == whole * self.block_k:  # a block in one copy
                flat = (of[:, None] * whole + blocks).view(-1)
                taken = x.view(len(x) * whole, self.block_k * x.shape[2]).index_select(0, flat)
            else:
                x = x[:, : whole * self.block_k].unflatten(1, (whole, self.block_k))
                taken = x[of[:, None], blocks]
            return taken.view(len(heads), 1, blocks.shape[-1] * self.block_k, x.shape[-1])

        return self.kv.map(take)

    def at(self, heads: Tensor, positions: Tensor) -> KV:
        """Plain keys and values [R, 1, N] at positions [R, N] of index heads [R]; zeros at Tk."""
        of, there = self.kv_heads(heads), positions < self.length
        whole, positions = bool(there.all()), positions.clamp(max=self.length - 1)
        kv = self.kv.at(of, positions)
        return kv if whole else kv.map(lambda x: x.masked_fill(~there[:, None, :, None], 0))


def _row(
    q: Tensor,
    kv: KV,
    blocks: Tensor,
    counts: Tensor,
    index: BlockLists,
    order: Tensor | None,
    softmax: Softmax,
) -> Partial:
    """One row of the batch without its padding: q [1, H, Tq, D], blocks [Hs, Nq, M], order [Hs, Tk]."""
    _, h, tq, d = q.shape
    hs, block_q = blocks.shape[0], min(index.block_q, tq)
    nq, share = -(-tq // block_q), h // hs
    keys = _Keys.of(kv, order, hs, index.block_k)
    first = keys.length - tq + torch.arange(0, tq, block_q, device=q.device)
    result = empty_partial(q, kv.value_dim)
    step = max(1, _ENTRIES // (hs * max(blocks.shape[2], share * block_q * d)))
    for a in range(0, nq, step):
        z = min(a + step, nq)
        rows = slice(a * block_q, min(z * block_q, tq))
        some = pad(q[0, :, rows], (0, 0, 0, -(rows.stop - rows.start) % block_q))
        work = some.view(hs, share, z - a, block_q, d).transpose(1, 2)
        part = _span(work, blocks[:, a:z].long(), counts[:, a:z], first[a:z], keys, softmax)
        for into, x in zip(result, part, strict=True):
            x = x.unflatten(0, (hs, z - a)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
            into[0, :, rows] = x[:, : rows.stop - rows.start].to(into.dtype)
    return result


def _span(
    work: Tensor,
    chosen: Tensor,
    used: Tensor,
    first: Tensor,
    keys: _Keys,
    softmax: Softmax,
) -> Partial:
    """Some query blocks, work [Hs, Nq, share, block_q, D], which begin at first [Nq], over the blocks chosen
    [Hs, Nq, M], of which used [Hs, Nq] count -> [Hs * Nq, share, block_q, Dv], not rounded."""
    hs, nq, _, block_q, _ = work.shape
    last = (first + block_q - 1).clamp(max=keys.length - 1)
    counted = torch.arange(chosen.shape[2], device=chosen.device) < used[..., None]
    counted &= chosen < keys.begin.shape[1]  # a padded row ends before the others' last blocks
    chosen = chosen.where(counted, 0)

    def of_blocks(x: Tensor) -> Tensor:  # [Hs, Nk] -> [Hs, Nq, M]
        return x.gather(1, chosen.flatten(1)).view_as(chosen)

    early = counted & (of_blocks(keys.end) <= first[:, None])
    late = counted & ~early & (of_blocks(keys.begin) <= last[:, None])
    work, chosen, early, late = (x.flatten(0, 1) for x in (work, chosen, early, late))
    heads = torch.arange(hs, device=work.device).repeat_interleave(nq)
    before = _early(work, chosen, early, heads, keys, softmax)
    near = _late(work, chosen, late, heads, first.repeat(hs), last.repeat(hs), keys, softmax)
    return merge(before, near)


def _early(
    work: Tensor,
    chosen: Tensor,
    early: Tensor,
    heads: Tensor,
    keys: _Keys,
    softmax: Softmax,
) -> Partial:
    """Rows of work [R, share, block_q, D] of index heads [R] over those of the blocks chosen [R, M] that are
    early."""
    share, block_q, d = work.shape[1:]
    out, lse = _room(work, keys)
    many, rows = early.sum(1).sort(stable=True)
    sizes = many.unique_consecutive(return_counts=True)
    for size, group in zip(sizes[0].tolist(), rows.split(sizes[1].tolist()), strict=True):
        if size == 0:
            out[group], lse[group] = 0, -torch.inf
            continue
        for some in group.split(max(1, _GATHERED // (size * keys.block_k * d))):
            kv = keys.full(heads[some], chosen[some][early[some]].view(-1, size))
            part = kernel.attend(work[some].flatten(1, 2)[:, None], kv, softmax, wide=True)
            out[some] = part.out.view(-1, share, block_q, kv.value_dim).to(out.dtype)
            lse[some] = part.lse.view(-1, share, block_q)
    return Partial(out, lse)


def _late(
    work: Tensor,
    chosen: Tensor,
    late: Tensor,
    heads: Tensor,
    first: Tensor,
    last: Tensor,
    keys: _Keys,
    softmax: Softmax,
) -> Partial:
    """The same over the late ones, each query over what it sees of them; first, last [R]: positions of the
    rows' first and last queries."""
    share, block_q, d = work.shape[1:]
    out, lse = _room(work, keys)
    most = int(late.sum(1).max())
    if most == 0:
        return Partial(out.zero_(), lse.fill_(-torch.inf))
    slots = late.int().topk(most, dim=1).indices.sort(1).values
    there, blocks = late.gather(1, slots), chosen.gather(1, slots)
    own = torch.arange(block_q, device=work.device)
    step = max(1, _GATHERED // (most * keys.block_k * max(d, block_q)))
    for some in torch.arange(len(work), device=work.device).split(step):
        positions = keys.positions(heads[some], blocks[some])
        read = there[some][..., None] & (positions <= last[some, None, None])
        positions = positions.where(read, keys.length).flatten(1)  # [R, most * block_k]
        queries = (first[some, None] + own).clamp(max=keys.length - 1)
        mask = positions[:, None] <= queries[..., None]
        kv = keys.at(heads[some], positions)
        # Widened before they are expanded: once per index head.
        kv = kv.map(lambda x: x.to(out.dtype).expand(-1, share, -1, -1))
        part = kernel.attend(work[some], kv, softmax, mask=mask[:, None], wide=True)
        out[some], lse[some] = part.out.to(out.dtype), part.lse
    return Partial(out, lse)


def _room(work: Tensor, keys: _Keys) -> Partial:
    """Room for what rows of work [R, share, block_q, D] get, to be filled."""
    wide = torch.promote_types(work.dtype, torch.float32)
    out = torch.empty(*work.shape[:3], keys.kv.value_dim, dtype=wide, device=work.device)
    return Partial(out, torch.empty(work.shape[:3], dtype=wide, device=work.device))
