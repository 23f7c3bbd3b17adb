"""``block_sparse`` as batches of the library's attention, which needs no mask for most keys.

A row of work is one query block of one head of the index: the queries of all heads that share the index row,
against the keys of its blocks. Blocks whose keys are all behind the block's first query (*early*) need no
mask, and rows with equally many of them are one call: rows by keys by numbers, all sizes equal. The other
blocks (*late*: on the diagonal) are few; each row's are filled up to equally many, and a mask says which
query sees which of their keys. Both parts are merged in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...index import BlockIndex
from ...partial import Partial, merge
from .. import kernel
from ..padding import by_row

_ENTRIES = 1 << 21  # of the index, and numbers of queries, worked on at a time
_GATHERED = 1 << 20  # numbers of keys, and of values, gathered for one call


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, *, scale: float, softcap: float | None
) -> Partial:
    starts = [0] * q.shape[0] if index.start is None else index.start.tolist()
    key_order = index.key_order

    def row(b: int, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        order = None if key_order is None else key_order[b, :, starts[b] :] - starts[b]
        return _row(q, k, v, index.blocks[b], index.counts[b], index, order, scale, softcap)

    return by_row(q, k, v, starts, row)


class _Keys(NamedTuple):
    """Keys and values of one unpadded row of the batch, [Hkv, (Nk + 1) * block_k, D]: zeros from tk on, for
    whom nothing is to be read. places [Hs, Nk, block_k]: where the keys of each block stand, tk past the
    end."""

    k: Tensor
    v: Tensor
    places: Tensor
    tk: int
    natural: bool

    @staticmethod
    def of(k: Tensor, v: Tensor, order: Tensor | None, hs: int, block_k: int) -> _Keys:
        tk = k.shape[2]
        count = -(-tk // block_k)
        natural = order is None and block_k > 1
        if order is None:
            order = torch.arange(tk, device=k.device).expand(hs, -1)
        places = pad(order.long(), (0, count * block_k - tk), value=tk).unflatten(1, (count, block_k))
        more = (count + 1) * block_k - tk
        return _Keys(pad(k[0], (0, 0, 0, more)), pad(v[0], (0, 0, 0, more)), places, tk, natural)

    def blocks(self, heads: Tensor, of: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, 1, C * block_k, D] of the blocks chosen [R, C] by rows of the index heads
        ``of`` [R], from the KV heads [R]; whole blocks in one copy each."""
        block_k = self.places.shape[2]
        if not self.natural:
            return self.at(heads, self.places[of[:, None], chosen].flatten(1))
        flat = (heads[:, None] * (self.k.shape[1] // block_k) + chosen).view(-1)

        def take(x: Tensor) -> Tensor:
            taken = x.view(-1, block_k * x.shape[2]).index_select(0, flat)
            return taken.view(len(heads), 1, -1, x.shape[2])

        return take(self.k), take(self.v)

    def at(self, heads: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, 1, N, D] at positions [R, N] of the KV heads [R]."""
        flat = (heads[:, None] * self.k.shape[1] + positions).view(-1)

        def take(x: Tensor) -> Tensor:
            return x.flatten(0, 1).index_select(0, flat).view(len(heads), 1, -1, x.shape[2])

        return take(self.k), take(self.v)


def _row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    index: BlockIndex,
    order: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    """One row of the batch without its padding: q [1, H, Tq, D], blocks [Hs, Nq, M], order [Hs, Tk]."""
    _, h, tq, d = q.shape
    hs, block_q = blocks.shape[0], index.block_q
    nq = -(-tq // block_q)
    keys = _Keys.of(k, v, order, hs, index.block_k)
    # [Hs, heads that share an index row, Nq, block_q, D]
    queries = pad(q[0], (0, 0, 0, -tq % block_q)).unflatten(1, (nq, block_q)).unflatten(0, (hs, h // hs))
    first = keys.tk - tq + torch.arange(0, tq, block_q, device=q.device)
    room = hs * max(blocks.shape[2], h // hs * block_q * d)
    step = max(1, _ENTRIES // room)
    parts = []
    for a in range(0, nq, step):
        some = slice(a, min(a + step, nq))
        work = queries[:, :, some].transpose(1, 2)
        chosen, used = blocks[:, some].long(), counts[:, some]
        parts.append(_span(work, chosen, used, first[some], keys, scale, softcap))
    out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))  # [Hs, share, Nq, block_q, Dv]
    return Partial(
        out.flatten(2, 3).flatten(0, 1)[None, :, :tq], lse.flatten(2, 3).flatten(0, 1)[None, :, :tq]
    )


def _span(
    work: Tensor,
    chosen: Tensor,
    used: Tensor,
    first: Tensor,
    keys: _Keys,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Some query blocks, work [Hs, Nq, share, block_q, D], which begin at first [Nq], over the blocks chosen
    [Hs, Nq, M], of which used [Hs, Nq] count -> [Hs, share, Nq, block_q, Dv] in float32."""
    hs, nq, _, block_q, _ = work.shape
    last = (first + block_q - 1).clamp(max=keys.tk - 1)
    counted = torch.arange(chosen.shape[2], device=chosen.device) < used[..., None]
    counted &= chosen < keys.places.shape[1]  # a padded row ends before the others' last blocks
    chosen = chosen.where(counted, 0)

    def of_blocks(x: Tensor) -> Tensor:  # [Hs, Nk] -> [Hs, Nq, M]
        return x.gather(1, chosen.flatten(1)).view_as(chosen)

    early = counted & (of_blocks(keys.places.amax(2)) <= first[:, None])
    late = counted & ~early & (of_blocks(keys.places.amin(2)) <= last[:, None])
    work, chosen, early, late = (x.flatten(0, 1) for x in (work, chosen, early, late))
    heads = torch.arange(hs, device=work.device).repeat_interleave(nq)
    before = _early(work, chosen, early, heads, keys, scale, softcap)
    near = _late(work, chosen, late, heads, first.repeat(hs), last.repeat(hs), keys, scale, softcap)
    out, lse = merge(before, near)
    return Partial(out.unflatten(0, (hs, nq)).transpose(1, 2), lse.unflatten(0, (hs, nq)).transpose(1, 2))


def _early(
    work: Tensor,
    chosen: Tensor,
    early: Tensor,
    heads: Tensor,
    keys: _Keys,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Rows of work [R, share, block_q, D] over those of the blocks chosen [R, M] that are early."""
    share, block_q, d = work.shape[1:]
    result = _room(work, keys)
    many, rows = early.sum(1).sort(stable=True)
    sizes = many.unique_consecutive(return_counts=True)
    for size, group in zip(sizes[0].tolist(), rows.split(sizes[1].tolist()), strict=True):
        if size == 0:
            result.out[group], result.lse[group] = 0, -torch.inf
            continue
        for some in group.split(max(1, _GATHERED // (size * keys.places.shape[2] * d))):
            blocks = chosen[some][early[some]].view(-1, size)
            of = heads[some]
            key, value = keys.blocks(of * keys.k.shape[0] // len(keys.places), of, blocks)
            part = kernel.attend(
                work[some].flatten(1, 2)[:, None], key, value, scale=scale, softcap=softcap, wide=True
            )
            result.out[some] = part.out.view(-1, share, block_q, value.shape[3])
            result.lse[some] = part.lse.view(-1, share, block_q)
    return result


def _late(
    work: Tensor,
    chosen: Tensor,
    late: Tensor,
    heads: Tensor,
    first: Tensor,
    last: Tensor,
    keys: _Keys,
    scale: float,
    softcap: float | None,
) -> Partial:
    """The same over the late ones, each query over what it sees of them; first, last [R]: positions of the
    rows' first and last queries."""
    share, block_q, d = work.shape[1:]
    most = int(late.sum(1).max())
    result = _room(work, keys)
    if most == 0:
        result.out.zero_(), result.lse.fill_(-torch.inf)
        return result
    there, slots = late.int().topk(most, dim=1)
    blocks, of_kv = chosen.gather(1, slots), heads * keys.k.shape[0] // len(keys.places)
    own = torch.arange(block_q, device=work.device)
    size = most * keys.places.shape[2]
    step = max(1, _GATHERED // (size * max(d, block_q)))
    for some in torch.arange(len(work), device=work.device).split(step):
        positions = keys.places[heads[some, None], blocks[some]]
        read = (there[some] > 0)[..., None] & (positions <= last[some, None, None])
        positions = positions.where(read, keys.tk).flatten(1)  # [R, most * block_k]
        queries = first[some, None] + own
        causal = positions.shape == queries.shape and bool(
            (positions == queries).all()
        )  # the diagonal itself
        mask = positions[:, None] <= queries.clamp(max=keys.tk - 1)[..., None]
        key, value = keys.at(of_kv[some], positions)
        part = kernel.attend(
            work[some],
            key.expand(-1, share, -1, -1),
            value.expand(-1, share, -1, -1),
            scale=scale,
            causal=causal,
            mask=None if causal else mask[:, None],
            softcap=softcap,
            wide=True,
        )
        result.out[some], result.lse[some] = part
    return result


def _room(work: Tensor, keys: _Keys) -> Partial:
    """Room for what rows of work [R, share, block_q, D] get, to be filled."""
    wide = torch.promote_types(work.dtype, torch.float32)
    out = torch.empty(*work.shape[:3], keys.v.shape[2], dtype=wide, device=work.device)
    return Partial(out, torch.empty(work.shape[:3], dtype=wide, device=work.device))
