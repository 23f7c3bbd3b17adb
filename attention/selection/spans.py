"""Keys that are read from their own position on, each until a position of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..causal import causal_mask, positions
from ..keys import Keys
from ..kv import KV
from ..ops import kernel
from ..ops.block_sparse import block_sparse
from ..ops.select import by_threshold
from ..partial import Partial, merge
from ..softmax import Softmax
from ..summary import by_start
from .base import Pairs, Selection, total
from .blocks import BlockIndex

BLOCK = 64  # queries that share a list of keys
_CPU, _DEVICE = 1 << 22, 1 << 26  # pairs of query block and key that are looked at at a time


@dataclass(frozen=True, kw_only=True)
class Spans(Selection):
    """Key j of KV head h is read by the queries at positions j .. until[b, h, j] - 1, and by no query where
    until is at most j.

    until: [B, Hkv, Tk] int64. Positions of row b count from its first valid one. A window of w keys has
    until = j + w; any rule that keeps a set of keys and drops a key for good has such an end for each key.

    A block of queries attends to two sets, whose results are merged. The keys that all its queries read need
    no mask. The others enter or leave the set within the block.
    """

    called: ClassVar[str] = "Spans"

    until: Tensor

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        begin = torch.arange(keys.past, keys.length, BLOCK, device=q.device)[:, None]  # [Nq, 1]
        last = (begin + BLOCK).clamp(max=keys.length) - 1
        until, place = self.until[:, :, None], keys.places()
        most = (_CPU if q.device.type == "cpu" else _DEVICE) // (q.shape[0] * q.shape[1])
        step, lists, parts = max(1, most // max(keys.length, 2 * BLOCK * BLOCK)), [], []
        for n in range(0, len(begin), step):
            first, end = begin[n : n + step], last[n : n + step]
            all_read = (place <= first) & (until > end)  # [B, Hkv, n, Tk]
            some_read = (place <= end) & (until > torch.maximum(first, place)) & ~all_read
            lists.append(by_threshold(all_read.float(), 0.5))
            some = q[:, :, n * BLOCK : (n + step) * BLOCK]
            parts.append(
                self._changing(some, keys.kv, first, *by_threshold(some_read.float(), 0.5), keys.softmax)
            )
        size = max(tokens.shape[3] for tokens, _ in lists)
        index = BlockIndex(
            blocks=torch.cat([pad(tokens, (0, size - tokens.shape[3])) for tokens, _ in lists], 2).int(),
            counts=torch.cat([counts for _, counts in lists], 2),
            block_q=BLOCK,
            block_k=1,
        )
        common = block_sparse(q, keys.kv, index, keys.softmax, check=False, impl=impl)
        changing = Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))
        part = merge(common, changing)
        return Partial(part.out.to(q.dtype), part.lse), self._pairs(keys, rows, q.shape[1] // until.shape[1])

    def _changing(
        self, q: Tensor, kv: KV, first: Tensor, tokens: Tensor, counts: Tensor, softmax: Softmax
    ) -> Partial:
        """Queries q [B, H, T, D] in blocks that begin at first [n, 1] over the first ``counts`` [B, Hkv, n]
        of the keys ``tokens`` [B, Hkv, n, C] of each block."""
        b, h, t, d = q.shape
        hkv, n, c = tokens.shape[1:]
        counted = torch.arange(c, device=q.device) < counts[..., None]
        rows = kv.gather(tokens.flatten(2))
        k, v = (x.reshape(b * hkv * n, 1, c, -1) for x in rows.dense())
        unread = ~counted.reshape(b * hkv * n, 1, c, 1)
        kv = KV(k.masked_fill(unread, 0), v.masked_fill(unread, 0))  # 0 x NaN in an unread value would be NaN
        place = (first + torch.arange(BLOCK, device=q.device))[..., None]  # [n, BLOCK, 1]
        ends = self.until.gather(2, tokens.flatten(2)).view_as(tokens)
        mask = counted[..., None, :] & (tokens[..., None, :] <= place) & (place < ends[..., None, :])
        work = pad(q, (0, 0, 0, n * BLOCK - t)).view(b, hkv, h // hkv, n, BLOCK, d).transpose(2, 3)
        mask = mask.flatten(0, 2).repeat(1, h // hkv, 1)[:, None]  # the heads of a group are rows
        part = kernel.attend(work.reshape(b * hkv * n, 1, -1, d), kv, softmax, mask=mask, wide=True)
        out, lse = (
            x.view(b, hkv, n, h // hkv, BLOCK, -1).transpose(2, 3).reshape(b, h, n * BLOCK, -1)[:, :, :t]
            for x in part
        )
        return Partial(out, lse[..., 0])

    def _pairs(self, keys: Keys, rows: range, group: int) -> Pairs:
        place = keys.places()
        end = self.until.clamp(max=keys.past + rows.stop)
        return total((end - place.clamp(min=keys.past + rows.start)).clamp(min=0).sum(), group)

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        begin, end = chunk
        read = torch.zeros(len(starts), kv_heads, end, dtype=torch.bool, device=device)
        for start, rows in by_start(starts):
            place = torch.arange(end - start, device=device)
            read[rows, :, start:] = self.until[rows, :, : end - start] > place.clamp(min=begin - start)
        return read

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        """As ``Selection.to_mask``, [B, Hkv, Tq, Tk]."""
        queries, place = positions(tq, tk, self.until.device, rows)
        first = 0 if start is None else start.to(self.until.device)[:, None, None, None]
        until = self.until
        if start is not None:  # entry j belongs to position start + j
            at = (place - first).clamp(min=0).expand(len(until), until.shape[1], 1, tk)
            until = until.gather(2, at[:, :, 0])
        read = queries - first < until[:, :, None]
        return read & causal_mask(tq, tk, start, len(until), self.until.device, rows)

    @property
    def mask_heads(self) -> int:
        return self.until.shape[1]
