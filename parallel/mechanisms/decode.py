"""Decode over a KV cache that is spread over ranks: every rank has the queries, each attends to the keys it
holds, and one collective brings the partial results together."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...attention.attend import Reads, count_reads, explained
from ...attention.index import Index, TokenIndex, Window
from ...attention.method import DECODE, AttentionMethod
from ...attention.ops import kernel
from ...attention.ops.decode import decode as attend_all
from ...attention.ops.gather_decode import gather_decode
from ...attention.partial import Partial, empty_partial, merge
from ..group.comm import Ranks, pack, unpack
from .keys import ShardedKeys
from .layout import Layout


def decode(
    method: AttentionMethod, q: Tensor, keys: ShardedKeys, window: int | None
) -> tuple[Partial, Reads]:
    """Attention of q [B, H, Tq, D], the same on every rank, over what ``method`` (or the model's own
    ``window``) selects of all ranks' keys. -> the same Partial on every rank; Reads counts this rank's part.
    """
    index = method.select_decode(q, keys) if window is None else Window(size=window)
    part, pairs = _local(q, keys, index)
    hs = index.tokens.shape[1] if isinstance(index, TokenIndex) else keys.kv.num_kv_heads
    causal = _pairs(q, keys, None)
    reads = count_reads(q, keys.kv, causal if pairs is None else pairs, causal, q.shape[1] // hs)
    return merge_ranks(part, q.dtype, keys.ranks), explained(reads, method, DECODE, keys, index)


def merge_ranks(part: Partial, dtype: torch.dtype, ranks: Ranks) -> Partial:
    """Merge every rank's partial in the order of ranks. Sends (P - 1) (D e + 4) bytes per query head, e of
    ``dtype``, which is what out is rounded to for the way."""
    mine = (part.out.to(dtype).contiguous(), part.lse)
    outs, lses = unpack(ranks.all_gather(pack(*mine), "partials"), *mine)
    return merge(*(Partial(out, lse) for out, lse in zip(outs, lses, strict=True)))


def _local(q: Tensor, keys: ShardedKeys, index: Index) -> tuple[Partial, int | Tensor | None]:
    """Attention over the selected keys that are here, and how many (query head, key) pairs those are."""
    if index is None:
        return _band(q, keys, None), None
    if isinstance(index, Window):
        return _window(q, keys, index), _pairs(q, keys, index)
    if not isinstance(index, TokenIndex):
        raise TypeError(
            f"select_decode answers with None, a Window or a TokenIndex; got {type(index).__name__}."
        )
    here, counts = localise(index, keys.places())
    group = q.shape[1] // here.tokens.shape[1]
    part = gather_decode(q, keys.kv, here, keys.softmax, check=False)
    if index.full is None:
        return part, counts.sum() * group
    full = index.full.repeat_interleave(group, 1)  # [B, H, Tq]
    whole = _band(q, keys, None)
    lse = torch.where(full, whole.lse, part.lse)
    out = torch.where(full[..., None], whole.out.to(q.dtype), part.out.to(q.dtype))
    seen = _seen(keys, keys.layout, keys.ranks.rank).to(q.device)  # [B, Tq]
    return Partial(out, lse), torch.where(index.full, seen[:, None], counts).sum() * group


def localise(index: TokenIndex, places: Tensor) -> tuple[TokenIndex, Tensor]:
    """Of the selected tokens those at ``places`` [N] (ascending positions), as an index of these N.

    -> (index, counts [B, Hs, Tq]).
    """
    n, m = places.shape[0], index.tokens.shape[-1]
    if n == 0:
        none = index.tokens.new_zeros(index.tokens.shape[:-1])
        return dataclasses.replace(index, tokens=index.tokens[..., :0], counts=none.int(), full=None), none
    found = torch.searchsorted(places, index.tokens.contiguous()).clamp_(max=n - 1)
    mine = places[found] == index.tokens
    if index.counts is not None:
        mine &= torch.arange(m, device=places.device) < index.counts[..., None]
    counts = mine.sum(-1)
    room = m if index.tokens.is_cuda else int(counts.max())  # there, asking would wait for the device
    order = torch.where(mine, found, n).sort(-1).values[..., :room]
    tokens = torch.where(order < n, order, order[..., :1]).clamp_(max=n - 1)
    return TokenIndex(tokens=tokens, counts=counts.int()), counts


def _window(q: Tensor, keys: ShardedKeys, index: Window) -> Partial:
    local = _band(q, keys, index.size)
    if index.sinks == 0 or keys.longest() <= index.size:
        return local
    starts = keys.starts or [0]
    low, high = keys.held(min(starts)), keys.held(max(starts) + index.sinks)
    places = keys.places()[low:high]
    left = places <= _rows(keys)[:, None] - index.size  # of the window
    first = 0 if keys.start is None else keys.start[:, None, None]
    sinks = (places >= first) & (places < first + index.sinks)
    return merge(local, _masked(q, keys, low, high, left & sinks))


def _band(q: Tensor, keys: ShardedKeys, window: int | None) -> Partial:
    """The keys here that each query sees, of the last ``window`` where there is one. Those that all queries
    see go unmasked; at most Tq - 1 at either end differ."""
    first, last = keys.past, keys.total - 1
    hi, end = keys.held(first + 1), keys.held(last + 1)
    low = lo = 0
    if window is not None:
        low, lo = keys.held(max(0, first - window + 1)), keys.held(max(0, last - window + 1))
    lo = min(lo, hi)
    parts = [_unmasked(q, keys, lo, hi)]
    for a, b in ((low, lo), (hi, end)):
        if a < b:
            places = keys.places()[a:b]
            seen = places <= _rows(keys)[:, None]
            if window is not None:
                seen &= places > _rows(keys)[:, None] - window
            if keys.start is not None:
                seen = seen & (places >= keys.start[:, None, None])
            parts.append(_masked(q, keys, a, b, seen))
    return merge(*parts)


def _rows(keys: ShardedKeys) -> Tensor:
    return torch.arange(keys.past, keys.total, device=keys.kv.device)


def _unmasked(q: Tensor, keys: ShardedKeys, a: int, b: int) -> Partial:
    """Rows a .. b - 1 of what is here, for every query: the queries of a group are heads of one call."""
    if a == b:
        return empty_partial(q, keys.kv.value_dim)
    batch, h, tq, d = q.shape
    start = None
    if keys.starts is not None:
        at = [min(max(keys.held(first) - a, 0), b - a) for first in keys.starts]
        start = torch.tensor(at, device=q.device) if any(at) else None
    part = attend_all(
        q.reshape(batch, h * tq, 1, d),
        keys.kv[:, :, a:b],
        keys.softmax,
        start=start,
    )
    return Partial(part.out.reshape(batch, h, tq, -1), part.lse.reshape(batch, h, tq))


def _masked(q: Tensor, keys: ShardedKeys, a: int, b: int, seen: Tensor) -> Partial:
    """Rows a .. b - 1 of what is here, where ``seen`` [Tq or B, Tq, b - a] says so."""
    h, tq, hkv = q.shape[1], q.shape[2], keys.kv.num_kv_heads
    mask = (seen if seen.dim() == 3 else seen[None]).repeat(1, h // hkv, 1)[:, None]
    part = kernel.attend(kernel.fold_groups(q, hkv), keys.kv[:, :, a:b], keys.softmax, mask=mask)
    return kernel.unfold_groups(part, h, tq)


def _seen(keys: ShardedKeys, layout: Layout, rank: int) -> Tensor:
    """[B, Tq] int64, how many of the rank's keys each query sees."""
    starts = keys.starts or [0] * keys.kv.batch
    rows = range(keys.past, keys.total)
    return torch.tensor(
        [
            [max(0, layout.below(rank, row + 1) - layout.below(rank, first)) for row in rows]
            for first in starts
        ]
    )


def _pairs(q: Tensor, keys: ShardedKeys, window: Window | None) -> int:
    """(query head, key) pairs of this rank's keys that dense attention, or the window, reads."""
    if window is None:
        return int(_seen(keys, keys.layout, keys.ranks.rank).sum()) * q.shape[1]
    total = 0
    for first in keys.starts or [0] * keys.kv.batch:
        for row in range(keys.past, keys.total):
            low = max(first, row - window.size + 1)
            total += max(0, keys.held(row + 1) - keys.held(low))
            total += max(0, keys.held(min(first + window.sinks, low)) - keys.held(first))
    return total * q.shape[1]
