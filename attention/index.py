"""Which keys each query reads: the only thing a selective method has to answer.

Positions are absolute places in the key sequence, 0 .. Tk - 1, padding included. Queries are the last Tq
positions. A row b of a left-padded batch begins at ``start[b]``; nothing before it is ever read.

An index is one of
  ``None``        every visible key (dense),
  ``Window``      a static pattern of recent keys and sinks,
  ``BlockIndex``  key blocks per query block (prefill),
  ``TokenIndex``  single keys per query (decode).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Window:
    """The last ``size`` keys of each query, itself included, and the first ``sinks`` keys of its row."""

    size: int
    sinks: int = 0

    def to_mask(self, tq: int, tk: int, start: Tensor | None, batch: int) -> Tensor:
        """Boolean mask [B, 1, Tq, Tk] of the keys read; causality and padding included."""
        mask = causal_mask(tq, tk, start, batch)
        rows, cols = _positions(tq, tk, mask.device)
        first = torch.zeros(batch, dtype=torch.long) if start is None else start.cpu()
        sink = cols[None] < (first.to(mask.device) + self.sinks)[:, None, None]
        return mask & ((cols > rows - self.size)[None, None] | sink[:, None])


@dataclass(frozen=True, kw_only=True)
class BlockIndex:
    """Key blocks read by each block of queries.

    blocks: [B, Hs, Nq, M] int32, key block numbers, ascending within the first ``counts`` entries; Hs is Hkv
            (the query heads of a group share a row) or H. Entries past the count are ignored.
    counts: [B, Hs, Nq] int32.
    key_order: [B, Hs, Tk] permutation of positions, for methods that reorder keys (None: natural order).

    Query block n holds queries n * block_q .. of this call, counted from the row's first valid position in
    it; key block j of row b begins at start[b] + j * block_k. Causality within the blocks is always by
    position.
    """

    blocks: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    start: Tensor | None = None
    key_order: Tensor | None = None

    def check(self, tk: int) -> None:
        """Raise ValueError where the counted blocks of a query block are not distinct, ascending blocks of
        Tk keys."""
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(
                f"A BlockIndex has blocks of at least 1 position; got {self.block_q} and {self.block_k}."
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

    def to_mask(self, tq: int, tk: int) -> Tensor:
        """Boolean mask [B, Hs, Tq, Tk] of the (query, key) pairs read; causality and padding included."""
        b, hs, nq, m = self.blocks.shape
        device = self.blocks.device
        past = tk - tq
        start = (
            torch.zeros(b, dtype=torch.long, device=device) if self.start is None else self.start.to(device)
        )
        used = torch.arange(m, device=device) < self.counts[..., None]
        nk = -(-tk // self.block_k) + 1
        chosen = torch.zeros(b, hs, nq, nk + 1, dtype=torch.bool, device=device)
        chosen.scatter_(
            3, torch.where(used, self.blocks.long(), nk), True
        )  # slot nk collects the unused entries
        rows, cols = torch.arange(past, tk, device=device), torch.arange(tk, device=device)
        if self.key_order is None:
            ordered = cols.expand(b, hs, tk)
        else:
            ordered = torch.empty_like(self.key_order, dtype=torch.long)
            ordered.scatter_(
                2, self.key_order.long(), cols.expand(b, hs, tk).clone()
            )  # place of each position
        mask = torch.zeros(b, hs, tq, tk, dtype=torch.bool, device=device)
        for i in range(b):
            first = int(start[i])
            n = torch.clamp((rows - max(past, first)) // self.block_q, 0, nq - 1)
            j = torch.clamp((ordered[i] - first) // self.block_k, 0, nk - 1)  # [Hs, Tk]
            for h in range(hs):
                mask[i, h] = chosen[i, h][n][:, j[h]]
        return mask & causal_mask(tq, tk, self.start, b, device)

    def pairs(self, tq: int, tk: int, rows: range | None = None) -> Tensor:
        """Number of (query, key) pairs read, summed over batch and Hs; int64 scalar tensor. No [Tq, Tk]
        tensor is made. rows: of these queries of the call alone."""
        counted = range(tq) if rows is None else rows
        b, _, nq, m = self.blocks.shape
        if self.key_order is not None:
            return self.to_mask(tq, tk)[:, :, counted.start : counted.stop].sum()
        device, past = self.blocks.device, tk - tq
        start = (
            torch.zeros(b, dtype=torch.long, device=device) if self.start is None else self.start.to(device)
        )
        begin = torch.clamp(start - past, min=0)  # [B], first valid query row of this call
        row = begin[:, None, None] + torch.arange(nq * self.block_q, device=device).view(1, nq, self.block_q)
        q_pos = row + past  # [B, Nq, block_q]
        lo = start[:, None, None, None] + self.blocks.long() * self.block_k  # [B, Hs, Nq, M]
        seen = torch.clamp(q_pos[:, None, :, :, None] + 1 - lo[..., None, :], 0, self.block_k)
        used = torch.arange(m, device=device) < self.counts[..., None]
        inside = (row >= counted.start) & (row < counted.stop)
        seen = seen * used[..., None, :] * inside[:, None, :, :, None]
        return seen.sum()


@dataclass(frozen=True, kw_only=True)
class TokenIndex:
    """Single keys read by each decode query.

    tokens: [B, Hs, Tq, K] int64 absolute positions; Hs is Hkv or H. Entries past the count repeat a counted
            one, so that reading them is harmless, and are masked.
    counts: [B, Hs, Tq] int32, or None where all K entries count.
    full:   [B, Hs, Tq] bool, rows that read every visible key instead (their tokens are ignored), or None.
    gathered: (k, v), each [B, Hs, K, D], the chosen rows already side by side in the order of ``tokens``,
            where the method keeps them (Tq = 1 only); or None.
    """

    tokens: Tensor
    counts: Tensor | None = None
    full: Tensor | None = None
    gathered: tuple[Tensor, Tensor] | None = None

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

    def to_mask(self, tq: int, tk: int, start: Tensor | None = None) -> Tensor:
        """Boolean mask [B, Hs, Tq, Tk] of the keys read."""
        b, hs, _, k = self.tokens.shape
        device = self.tokens.device
        used = torch.ones_like(self.tokens, dtype=torch.bool)
        if self.counts is not None:
            used = torch.arange(k, device=device) < self.counts[..., None]
        mask = torch.zeros(b, hs, tq, tk + 1, dtype=torch.bool, device=device)
        mask.scatter_(3, torch.where(used, self.tokens, tk), True)
        mask = mask[..., :tk]
        if self.full is not None:
            mask = torch.where(self.full[..., None], causal_mask(tq, tk, start, b, device), mask)
        return mask


Index = Window | BlockIndex | TokenIndex | None


def causal_mask(
    tq: int, tk: int, start: Tensor | None, batch: int, device: torch.device | None = None
) -> Tensor:
    """Boolean mask [B, 1, Tq, Tk]: query row i (position tk - tq + i) sees key j iff start[b] <= j <= its
    position.

    tq = 3, tk = 5          tq = 3, tk = 3, start = 1
      k 0 1 2 3 4             k 0 1 2
    q   x x x . .           q   . . .
        x x x x .               . x .
        x x x x x               . x x
    """
    if device is None:
        device = torch.device("cpu") if start is None else start.device
    rows, cols = _positions(tq, tk, device)
    mask = (cols <= rows)[None, None].expand(batch, 1, tq, tk)
    if start is not None:
        mask = mask & (cols[None] >= start.to(device)[:, None, None])[:, None]
    return mask


def _positions(tq: int, tk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.arange(tk - tq, tk, device=device)[:, None], torch.arange(tk, device=device)[None, :]


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
