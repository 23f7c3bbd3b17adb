"""Which keys each query reads: the only thing a selective method has to answer.

Positions are absolute places in the key sequence, 0 .. Tk - 1, padding included. Queries are the last Tq
positions. A row b of a left-padded batch begins at ``start[b]``; nothing before it is ever read.

An index is one of
  ``None``        every visible key (dense),
  ``Window``      a static pattern of recent keys and sinks,
  ``Bands``       a static pattern of keys at regular distances, and sinks (prefill),
  ``BlockIndex``  key blocks per query block (prefill),
  ``Rescaled``    either of None and BlockIndex, some of whose keys count for less (prefill),
  ``TokenIndex``  single keys per query (decode).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .kv import KV

_ENTRIES = 1 << 22  # of an index, looked at at a time to count what it names


@dataclass(frozen=True, kw_only=True)
class Window:
    """The last ``size`` keys of each query, itself included, and the first ``sinks`` keys of its row."""

    size: int
    sinks: int = 0

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None, batch: int, rows: Tensor | None = None
    ) -> Tensor:
        """Boolean mask [B, 1, Tq, Tk] of the keys read; causality and padding included. rows [R]: of these
        queries of the call alone, [B, 1, R, Tk]."""
        mask = causal_mask(tq, tk, start, batch, rows=rows)
        places, cols = _positions(tq, tk, mask.device, rows)
        first = torch.zeros(batch, dtype=torch.long) if start is None else start.cpu()
        sink = cols[None] < (first.to(mask.device) + self.sinks)[:, None, None]
        return mask & ((cols > places - self.size)[None, None] | sink[:, None])


class Band(NamedTuple):
    """The keys at distances near, near + stride, ... < far behind a query (far None: down to the row's
    first); ``near`` is a multiple of ``stride``.

        stride = 2, near = 2, far = 6      key   0 1 2 3 4 5 6 7
                                     query 7     . . . x . x . .
    """

    stride: int
    near: int = 0
    far: int | None = None


@dataclass(frozen=True, kw_only=True)
class Bands:
    """Keys whose distances behind a query lie in one of the ``bands``, no two of which share a distance, and
    the first ``sinks`` keys of its row."""

    bands: tuple[Band, ...]
    sinks: int = 0

    def hold(self, distance: Tensor) -> Tensor:
        """Whether keys at these distances, none below 0, lie in a band; bool like ``distance``."""
        held = torch.zeros_like(distance, dtype=torch.bool)
        for stride, near, far in self.bands:
            inside = (distance >= near) & (distance % stride == 0)
            held |= inside if far is None else inside & (distance < far)
        return held

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None, batch: int, rows: Tensor | None = None
    ) -> Tensor:
        """Boolean mask [B, 1, Tq, Tk] of the keys read; causality and padding included. rows [R]: of these
        queries of the call alone, [B, 1, R, Tk]."""
        mask = causal_mask(tq, tk, start, batch, rows=rows)
        places, cols = _positions(tq, tk, mask.device, rows)
        first = torch.zeros(batch, dtype=torch.long) if start is None else start.cpu()
        sink = cols[None] < (first.to(mask.device) + self.sinks)[:, None, None]
        return mask & (self.hold((places - cols).clamp(min=0))[None, None] | sink[:, None])

    def pairs(self, begin: int, end: int) -> int:
        """Number of (query, key) pairs that the queries begin .. end - 1 of an unpadded row read."""
        return int(self.count(torch.arange(begin, end) + 1).sum())

    def count(self, seen: Tensor) -> Tensor:
        """How many keys each query reads that sees ``seen`` keys, those at distances 0 .. seen - 1."""
        total = seen.clamp(max=self.sinks)
        for stride, near, far in self.bands:
            reach = seen if far is None else seen.clamp(max=far)
            within = (-((near - reach) // stride)).clamp(min=0)
            lowest = (seen - self.sinks).clamp(min=near)  # of the distances of sinks, which count once
            shared = (-((-(-lowest // stride) * stride - reach) // stride)).clamp(min=0)
            total = total + within - shared
        return total


@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """Key blocks read by each block of queries.

    blocks: [B, Hs, Nq, M] int32, key block numbers, ascending within the first ``counts`` entries; Hs is Hkv
            (the query heads of a group share a row) or H. Entries past the count are ignored.
    counts: [B, Hs, Nq] int32.
    key_order: [B, Hs, Tk] permutation of positions, for methods that reorder keys (None: natural order).
    lead:   by how many queries the first query block is shorter, as it began before the call; 0 in a padded
            batch.

    Query block n holds queries n * block_q - lead .. of this call, counted from the row's first valid
    position in it; key block j of row b begins at start[b] + j * block_k. Causality within the blocks is
    always by position.
    """

    blocks: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    start: Tensor | None = None
    key_order: Tensor | None = None
    lead: int = 0

    def check(self, tk: int) -> None:
        """Raise ValueError where the counted blocks of a query block are not distinct, ascending blocks of
        Tk keys."""
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(
                f"A BlockIndex has blocks of at least 1 position; got {self.block_q} and {self.block_k}."
            )
        if not 0 <= self.lead < self.block_q or (self.lead and self.start is not None):
            raise ValueError(
                "A BlockIndex has a lead from 0 to block_q - 1, and 0 in a padded batch; got lead = "
                f"{self.lead} for block_q = {self.block_q}."
            )
        whole = [x for x in (self.blocks, self.counts, self.start, self.key_order) if x is not None]
        if any(x.is_floating_point() or x.dtype == torch.bool for x in whole):
            raise ValueError("A BlockIndex holds whole numbers; some tensor of it is of another kind.")
        m = self.blocks.shape[-1]
        place = torch.arange(m, device=self.blocks.device)
        used = place < self.counts[..., None]
        if bool((self.counts < 0).any()) or bool((self.counts > m).any()):
            raise ValueError(f"A BlockIndex with room for {m} blocks takes counts from 0 to {m}.")
        last = -(-tk // self.block_k)
        if bool((used & ((self.blocks < 0) | (self.blocks >= last))).any()):
            raise ValueError(
                f"A BlockIndex of {self.block_k} keys a block names blocks 0 to {last - 1} of {tk} keys; "
                "some block is outside."
            )
        falls = self.blocks[..., 1:] <= self.blocks[..., :-1]
        if bool((used[..., 1:] & falls).any()):
            raise ValueError(
                "A BlockIndex names each block of a query block once, in ascending order; some block comes "
                "twice or too late."
            )
        if self.key_order is not None:
            fits = self.key_order.shape == (*self.blocks.shape[:2], tk)
            every = torch.arange(tk, device=self.blocks.device)
            if not fits or not bool((self.key_order.sort(-1).values == every).all()):
                raise ValueError(
                    f"A BlockIndex's key_order holds, for each row and head of its blocks, every one of {tk} "
                    "positions once."
                )

    def to_mask(self, tq: int, tk: int, rows: Tensor | None = None) -> Tensor:
        """Boolean mask [B, Hs, Tq, Tk] of the (query, key) pairs read; causality and padding included. rows
        [R]: of these queries of the call alone, [B, Hs, R, Tk], and nothing larger is made."""
        b, hs, nq, m = self.blocks.shape
        device = self.blocks.device
        places, cols = _positions(tq, tk, device, rows)  # [R, 1], [1, Tk]
        start = (
            torch.zeros(b, dtype=torch.long, device=device) if self.start is None else self.start.to(device)
        )
        row = places[:, 0] - start.clamp(min=tk - tq)[:, None]  # [B, R], within the call
        block = ((row + self.lead) // self.block_q).clamp(0, nq - 1)[:, None].expand(b, hs, -1)
        blocks = self.blocks.gather(2, block[..., None].expand(-1, -1, -1, m)).long()  # [B, Hs, R, M]
        used = torch.arange(m, device=device) < self.counts.gather(2, block)[..., None]
        nk = -(-tk // self.block_k)
        chosen = torch.zeros(*blocks.shape[:3], nk + 1, dtype=torch.bool, device=device)
        chosen.scatter_(3, torch.where(used, blocks, nk), True)  # slot nk collects the unused entries
        if self.key_order is None:
            ordered = cols.expand(b, hs, tk)
        else:
            ordered = torch.empty_like(self.key_order, dtype=torch.long)
            ordered.scatter_(
                2, self.key_order.long(), cols.expand(b, hs, tk).clone()
            )  # place of each position
        j = ((ordered - start[:, None, None]) // self.block_k).clamp(min=0)  # [B, Hs, Tk]
        mask = chosen.gather(3, j[:, :, None].expand(-1, -1, chosen.shape[2], -1))
        return mask & causal_mask(tq, tk, self.start, b, device, rows)

    def pairs(self, tq: int, tk: int, rows: range | None = None) -> Tensor:
        """Number of (query, key) pairs read, summed over batch and Hs; int64 scalar tensor. No [Tq, Tk]
        tensor is made. rows: of these queries of the call alone."""
        counted = range(tq) if rows is None else rows
        b, _, nq, m = self.blocks.shape
        if self.key_order is not None:
            return self._reordered_pairs(tq, tk, counted)
        device, past = self.blocks.device, tk - tq
        start = (
            torch.zeros(b, dtype=torch.long, device=device) if self.start is None else self.start.to(device)
        )
        begin = torch.clamp(start - past, min=0)[:, None]  # [B, 1], first valid query row of this call
        row = (
            begin + torch.arange(nq, device=device) * self.block_q - self.lead
        )  # [B, Nq], each block's first
        first = row.clamp(min=counted.start)
        stop = torch.maximum(first, (row + self.block_q).clamp(max=counted.stop))
        total = torch.zeros((), dtype=torch.long, device=device)
        place = torch.arange(m, device=device)
        step = max(1, _ENTRIES // max(1, self.blocks[:, :, :1].numel()))
        for n in range(0, nq, step):
            some = slice(n, n + step)
            lo = start[:, None, None, None] + self.blocks[:, :, some].long() * self.block_k
            before, upto = (x[:, None, some, None] + past - lo for x in (first, stop))  # [B, Hs, step, M]
            used = place < self.counts[:, :, some, None]
            total += ((self._seen_by(upto) - self._seen_by(before)) * used).sum()
        return total

    def _reordered_pairs(self, tq: int, tk: int, rows: range) -> Tensor:
        """The same for blocks of keys in another order: of each key block, the keys before a query block's
        first query are seen by all of its queries, the others each by those that are no earlier."""
        assert self.key_order is not None
        device, (b, hs, nq, m) = self.blocks.device, self.blocks.shape
        past, starts = tk - tq, [0] * b if self.start is None else self.start.tolist()
        used = torch.arange(m, device=device) < self.counts[..., None]
        total = torch.zeros((), dtype=torch.long, device=device)
        for i, first in enumerate(starts):
            begin = max(past, first) + torch.arange(nq, device=device) * self.block_q - self.lead
            begin, end = (x.clamp(past + rows.start, past + rows.stop) for x in (begin, begin + self.block_q))
            for s in range(hs):  # one head at a time: [key blocks, query blocks] of each
                order = self.key_order[i, s, first:].long()
                places = pad(order, (0, -len(order) % self.block_k), value=tk).view(-1, self.block_k)
                places = places.sort(-1).values
                sums = pad(places.cumsum(-1), (1, 0))
                before, until = (
                    torch.searchsorted(places, x.expand(len(places), nq).contiguous()) for x in (begin, end)
                )
                late = (until - before) * end - (sums.gather(1, until) - sums.gather(1, before))
                seen = (before * (end - begin) + late).T  # [Nq, Nk]
                there = used[i, s] & (self.blocks[i, s] < len(places))
                total += (seen.gather(1, self.blocks[i, s].long().clamp(max=len(places) - 1)) * there).sum()
        return total

    def _seen_by(self, rows: Tensor) -> Tensor:
        """How many keys of a block the first ``rows`` queries from its first key on see, all together."""
        inside = rows.clamp(0, self.block_k)
        return inside * (inside + 1) // 2 + (rows - inside).clamp(min=0) * self.block_k


@dataclass(frozen=True, kw_only=True)
class Rescaled:
    """What ``read`` names, some of it with another weight: of each query's attention ``keys`` [B, H, Tk]
    (bool, of each query head) keep ``factor`` (0 to 1) of their share, and what the query reads besides them
    grows in proportion to fill the row again. Where that is nothing, they keep all of it."""

    read: BlockIndex | None
    keys: Tensor
    factor: float

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None, batch: int, rows: Tensor | None = None
    ) -> Tensor:
        """Boolean mask [B, 1 | Hs, Tq, Tk] of the pairs read, as of ``read``."""
        if self.read is None:
            return causal_mask(tq, tk, start, batch, self.keys.device, rows)
        return self.read.to_mask(tq, tk, rows)


@dataclass(frozen=True, kw_only=True)
class TokenIndex:
    """Single keys read by each decode query.

    tokens: [B, Hs, Tq, K] int64 absolute positions; Hs is Hkv or H. Entries past the count repeat a counted
            one, so that reading them is harmless, and are masked.
    counts: [B, Hs, Tq] int32, or None where all K entries count.
    full:   [B, Hs, Tq] bool, rows that read every visible key instead (their tokens are ignored), or None.
    gathered: keys and values [B, Hs, K], the chosen rows already side by side in the order of ``tokens``,
            where the method keeps them (Tq = 1 only); or None.
    """

    tokens: Tensor
    counts: Tensor | None = None
    full: Tensor | None = None
    gathered: KV | None = None

    def check(self, tk: int) -> None:
        """Raise ValueError where a query's counted tokens are not distinct positions among Tk keys."""
        k = self.tokens.shape[-1]
        used = torch.ones_like(self.tokens, dtype=torch.bool)
        if self.counts is not None:
            if bool((self.counts < 0).any()) or bool((self.counts > k).any()):
                raise ValueError(f"A TokenIndex with room for {k} tokens takes counts from 0 to {k}.")
            used = torch.arange(k, device=self.tokens.device) < self.counts[..., None]
        if bool((used & ((self.tokens < 0) | (self.tokens >= tk))).any()):
            raise ValueError(f"A TokenIndex names positions 0 to {tk - 1}; some token is outside.")
        # Entries past the count get places of their own, so that only counted ones can meet.
        apart = torch.where(used, self.tokens, tk + torch.arange(k, device=self.tokens.device))
        ordered = apart.sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise ValueError("A TokenIndex names each token of a query once; some token comes twice.")

    def to_mask(self, tq: int, tk: int, start: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Boolean mask [B, Hs, Tq, Tk] of the keys read. rows [R]: of these queries of the call alone,
        [B, Hs, R, Tk]."""
        some = slice(None) if rows is None else rows
        tokens = self.tokens[:, :, some]
        counts, full = (None if x is None else x[:, :, some] for x in (self.counts, self.full))
        device = tokens.device
        used = torch.ones_like(tokens, dtype=torch.bool)
        if counts is not None:
            used = torch.arange(tokens.shape[3], device=device) < counts[..., None]
        mask = torch.zeros(*tokens.shape[:3], tk + 1, dtype=torch.bool, device=device)
        mask.scatter_(3, torch.where(used, tokens, tk), True)
        mask = mask[..., :tk]
        if full is not None:
            visible = causal_mask(tq, tk, start, tokens.shape[0], device, rows)
            mask = torch.where(full[..., None], visible, mask)
        return mask


Index = Window | Bands | BlockIndex | Rescaled | TokenIndex | None


def causal_mask(
    tq: int,
    tk: int,
    start: Tensor | None,
    batch: int,
    device: torch.device | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Boolean mask [B, 1, Tq, Tk]: query row i (position tk - tq + i) sees key j iff start[b] <= j <= its
    position. rows [R]: of these query rows alone, [B, 1, R, Tk].

    tq = 3, tk = 5          tq = 3, tk = 3, start = 1
      k 0 1 2 3 4             k 0 1 2
    q   x x x . .           q   . . .
        x x x x .               . x .
        x x x x x               . x x
    """
    if device is None:
        device = torch.device("cpu") if start is None else start.device
    places, cols = _positions(tq, tk, device, rows)
    mask = (cols <= places)[None, None].expand(batch, 1, -1, -1)
    if start is not None:
        mask = mask & (cols[None] >= start.to(device)[:, None, None])[:, None]
    return mask


def _positions(tq: int, tk: int, device: torch.device, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of the queries, all or ``rows`` of them, [R, 1]; of the keys [1, Tk]."""
    queries = torch.arange(tq, device=device) if rows is None else rows.to(device)
    return (tk - tq + queries)[:, None], torch.arange(tk, device=device)[None, :]


def causal_pairs(tq: int, tk: int, starts: list[int] | None, batch: int) -> int:
    """Number of causal (query, key) pairs per head, summed over the batch, queries in the padding left
    out."""
    past, total = tk - tq, 0
    for first in [0] * batch if starts is None else starts:
        lo, hi = (
            max(past, first) - first + 1,
            tk - first,
        )  # visible keys of the first and the last valid query
        total += (lo + hi) * (hi - lo + 1) // 2 if hi >= lo else 0
    return total
