"""Key blocks for blocks of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..keys import Keys
from ..lists import BlockLists
from ..ops.block_sparse import block_sparse
from ..partial import Partial
from ..summary import by_start
from .base import Pairs, Selection, total

_ENTRIES = 1 << 22  # entries of an index whose pairs are counted at a time
_CPU, _DEVICE = 1 << 22, 1 << 24  # pairs of blocks of queries and of keys that are counted at a time


@dataclass(frozen=True, kw_only=True)
class BlockIndex(BlockLists, Selection):
    """Key blocks read by each block of queries, as ``BlockLists`` has them."""

    called: ClassVar[str] = "a BlockIndex"

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        part = block_sparse(q, keys.kv, self, keys.softmax, check=False, impl=impl)
        return part, self.head_pairs(q, keys, rows)

    def head_pairs(self, q: Tensor, keys: Keys, rows: range) -> Pairs:
        """The (query head, key) pairs that the queries ``rows`` of a call of q [B, H, Tq, D] read."""
        return total(self.pairs(q.shape[2], keys.length, rows)) * (q.shape[1] // self.blocks.shape[1])

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        """As ``Selection.needed``. The blocks of a row are counted from its entry in ``starts``."""
        end = chunk[1]
        b, hs, nq, m = self.blocks.shape
        used = torch.arange(m, device=device) < self.counts[..., None]
        blocks = -(-end // self.block_k) + 1
        chosen = torch.zeros(b, hs, blocks, dtype=torch.bool, device=device)
        chosen.scatter_(2, torch.where(used, self.blocks.long(), blocks - 1).view(b, hs, nq * m), True)
        chosen[..., -1] = False  # where the unused entries went
        read = torch.zeros(b, hs, end, dtype=torch.bool, device=device)
        for start, rows in by_start(starts):
            own = chosen[rows].repeat_interleave(self.block_k, -1)[..., : end - start]
            if self.key_order is not None:
                own = torch.zeros_like(own).scatter_(2, self.key_order[rows].long(), own)
            read[rows, :, start:] = own
        return read.unflatten(1, (kv_heads, -1)).any(2)

    @property
    def mask_heads(self) -> int:
        return self.blocks.shape[1]

    def pairs(self, tq: int, tk: int, rows: range | None = None) -> Tensor:
        """Number of (query, key) pairs read, summed over batch and Hs; int64 scalar tensor. No [Tq, Tk]
        tensor is made. rows: only these queries of the call."""
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
        )  # [B, Nq], first of each block
        first = row.clamp(min=counted.start)
        stop = torch.maximum(first, (row + self.block_q).clamp(max=counted.stop))
        count = torch.zeros((), dtype=torch.long, device=device)
        place = torch.arange(m, device=device)
        step = max(1, _ENTRIES // max(1, self.blocks[:, :, :1].numel()))
        for n in range(0, nq, step):
            some = slice(n, n + step)
            lo = start[:, None, None, None] + self.blocks[:, :, some].long() * self.block_k
            before, upto = (x[:, None, some, None] + past - lo for x in (first, stop))  # [B, Hs, step, M]
            used = place < self.counts[:, :, some, None]
            count += ((self._seen_by(upto) - self._seen_by(before)) * used).sum()
        return count

    def _reordered_pairs(self, tq: int, tk: int, rows: range) -> Tensor:
        """The same for blocks of keys in another order: of each key block, the keys before a query block's
        first query are seen by all of its queries, the others each by those that are no earlier."""
        assert self.key_order is not None
        device, (b, hs, nq, m) = self.blocks.device, self.blocks.shape
        past, starts = tk - tq, [0] * b if self.start is None else self.start.tolist()
        used = torch.arange(m, device=device) < self.counts[..., None]
        count = torch.zeros((), dtype=torch.long, device=device)
        for i, first in enumerate(starts):
            begin = max(past, first) + torch.arange(nq, device=device) * self.block_q - self.lead
            begin, end = (x.clamp(past + rows.start, past + rows.stop) for x in (begin, begin + self.block_q))
            nk = -(-(tk - first) // self.block_k)
            step = max(1, (_CPU if device.type == "cpu" else _DEVICE) // (nk * nq))
            for s in range(0, hs, step):  # [heads, key blocks, query blocks] of some heads
                order = self.key_order[i, s : s + step, first:].long()
                places = pad(order, (0, nk * self.block_k - order.shape[1]), value=tk)
                places = places.unflatten(1, (nk, self.block_k)).sort(-1).values
                sums = pad(places.cumsum(-1), (1, 0))
                before, until = (
                    torch.searchsorted(places, x.expand(*places.shape[:2], nq).contiguous())
                    for x in (begin, end)
                )
                late = (until - before) * end - (sums.gather(2, until) - sums.gather(2, before))
                seen = (before * (end - begin) + late).transpose(1, 2)  # [heads, Nq, Nk]
                blocks = self.blocks[i, s : s + step]
                there = used[i, s : s + step] & (blocks < nk)
                count += (seen.gather(2, blocks.long().clamp(max=nk - 1)) * there).sum()
        return count

    def _seen_by(self, rows: Tensor) -> Tensor:
        """Pairs of a block's keys with the first ``rows`` queries, counted from the block's first key on."""
        inside = rows.clamp(0, self.block_k)
        return inside * (inside + 1) // 2 + (rows - inside).clamp(min=0) * self.block_k
