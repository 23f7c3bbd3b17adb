"""Recent keys and summaries of the blocks before them, in one softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..causal import causal_mask, positions
from ..keys import Keys
from ..kv import KV
from ..ops import kernel
from ..ops.decode import decode
from ..ops.dispatch import Impls, run
from ..ops.flash import flash
from ..partial import Partial, empty_partial, merge
from .base import Pairs, Selection
from .here import attend_recent

_TILE = 64  # queries that are masked at a time, at least


@dataclass(frozen=True, kw_only=True)
class Summarised(Selection):
    """The last keys of each query, back to the edge of a block, and summaries of the blocks before.

    Positions count from the first token of the row. The query at position i has c = max(0, (i + 1 - local) //
    (block * step)) * step blocks behind it. It reads the keys block * c .. i, which are ``local`` .. local +
    block * step - 1 keys as far as there are so many, and summaries of the keys before them:

        block = 2, local = 3        key      0 1 2 3 4 5 6        summary   0 1
                                    query 5  . . x x x x .                  x .
                                    query 6  . . . . x x x                  x x

    levels: keys and values [B, Hkv, M] of the summaries. Entry j of level l stands for the 2^l blocks from j
    * 2^l on. The c blocks are covered by the first c >> top entries of the last level, top, and by one entry
    of each lower level l whose bit l of c is set:

        one level     c = 5 reads entries 0 .. 4
        three levels  c = 5 = 101b reads entry 0 of level 2 (blocks 0 .. 3) and entry 4 of level 0 (block 4)

    anchor: keys and values [B, Hkv, A] of the row's first A keys, a multiple of ``block`` and at most block *
    step of them. A query that has blocks behind it reads them in place of the first A / block entries of the
    one level.
    bias: by level, a number that is added to the logits of its entries, after a soft-cap (``Biased`` adds
    before it).
    Masks name the keys of the sequence alone; ``entries_read`` counts the summaries.
    """

    called: ClassVar[str] = "Summarised"

    block: int
    local: int
    levels: tuple[KV, ...]
    step: int = 1
    anchor: KV | None = None
    bias: tuple[float, ...] = (0.0,)

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        return self._run(q, keys, impl, flash), self._pairs(q, keys, rows)

    def run_decode(self, q: Tensor, keys: Keys, impl: str) -> tuple[Partial, Pairs]:
        return self._run(q, keys, impl, decode), self._pairs(q, keys, range(keys.tq))

    def run_decode_here(self, q: Tensor, keys: Keys) -> tuple[Partial, Pairs]:
        """As ``Selection.run_decode_here``. Every rank has all summaries, and reads its share of them."""
        part = self._rest(keys, range(keys.past, keys.length), q, keys.kv)
        if self._near:
            part = merge(attend_recent(q, keys, self._near), part)
        pairs = 0
        for first in keys.starts or [0] * q.shape[0]:
            anchored, bits, some = self._share(keys, keys.length - first)
            for row in range(max(keys.past, first), keys.length):
                behind = self._finished(row + 1 - first)
                pairs += keys.held(row + 1) - keys.held(first + self.block * behind)
                pairs += len(anchored) * (behind > 0) + sum(behind >> level & 1 for level in bits)
                pairs += len(range(some.start, min(some.stop, behind >> self._top)))
        return part, pairs * q.shape[1]

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        begin, end = chunk
        lowest = [first + self.block * self._finished(begin + 1 - first) for first in starts]
        read = torch.arange(end, device=device) >= torch.tensor(lowest, device=device)[:, None]
        return read[:, None].expand(-1, kv_heads, -1)

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        """As ``Selection.to_mask``, of the keys alone."""
        mask = causal_mask(tq, tk, start, batch, None if rows is None else rows.device, rows)
        places, cols = positions(tq, tk, mask.device, rows)
        first = torch.zeros(1, 1, dtype=torch.long) if start is None else start[:, None]
        first = first.to(mask.device)
        lowest = first + self.block * self._behind(places[:, 0] + 1 - first)  # [B or 1, R]
        return mask & (cols >= lowest[..., None])[:, None]

    def entries_read(self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1) -> Tensor:
        first = torch.zeros(batch, 1, dtype=torch.long) if start is None else start.cpu()[:, None]
        return self._entries(torch.arange(tk - tq, tk) + 1 - first)

    def _finished(self, seen: int) -> int:
        """The number of blocks behind a query that sees ``seen`` keys."""
        return max(0, (seen - self.local) // (self.block * self.step)) * self.step

    def _behind(self, seen: Tensor) -> Tensor:
        steps = ((seen - self.local) // (self.block * self.step)).clamp(min=0)
        return steps if self.step == 1 else steps * self.step

    def _entries(self, seen: Tensor) -> Tensor:
        """The number of summaries that queries read which see ``seen`` keys."""
        behind = self._behind(seen)
        count = sum((behind >> level & 1 for level in range(self._top)), behind >> self._top)
        return count if self.anchor is None else count + (self._anchored - self._replaced) * (behind > 0)

    @property
    def _top(self) -> int:
        """The number of the last level."""
        return len(self.levels) - 1

    @property
    def _anchored(self) -> int:
        """The number of keys of the anchor."""
        return 0 if self.anchor is None else self.anchor.length

    @property
    def _replaced(self) -> int:
        """How many summaries the anchor replaces."""
        return self._anchored // self.block

    def _pairs(self, q: Tensor, keys: Keys, rows: range) -> int:
        """The pairs that the queries ``rows`` of the call read."""
        begin, end, pairs = keys.past + rows.start, keys.past + rows.stop, 0
        for first in keys.starts or [0] * q.shape[0]:
            seen = torch.arange(min(max(begin, first), end), end) - first + 1
            pairs += int((seen - self.block * self._behind(seen) + self._entries(seen)).sum())
        return pairs * q.shape[1]

    @property
    def _near(self) -> int:
        """How many of a query's last keys the windowed kernel reads. It does not pay for a few of them."""
        return self.local if self.local > self.block else 0

    def _run(self, q: Tensor, keys: Keys, impl: str, op: Callable[..., Partial]) -> Partial:
        """The last keys by the windowed kernel, the other keys and the summaries tile by tile."""
        tile, parts = max(_TILE, min(self.block, 8 * _TILE)), []
        for a in range(0, q.shape[2], tile):
            rows = range(keys.past + a, keys.past + min(a + tile, q.shape[2]))
            how = "auto" if impl == "triton" else impl  # there is no kernel of its own
            parts.append(run("summaries", _IMPLS, how, q[:, :, a : a + tile], self, keys, rows))
        rest = Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))
        if not self._near:
            return rest
        near = op(q, keys.kv, keys.softmax, window=self._near, start=keys.start_here, impl=impl)
        return merge(near, rest)

    def _rest(self, keys: Keys, rows: range, q: Tensor, kv: KV) -> Partial:
        """Attention of the queries q [B, H, R, D] at positions ``rows`` over all but their last
        ``_near`` keys: keys held here and this rank's share of the summaries. A padded batch is taken row by
        row, so that nothing in the padding is read."""
        if keys.starts is None:
            return self._rest_from(0, q, keys, kv, rows)
        parts = []
        for b, first in enumerate(keys.starts):
            one, valid = slice(b, b + 1), range(min(max(rows.start, first), rows.stop), rows.stop)
            own = q[one, :, len(rows) - len(valid) :]
            part = empty_partial(q[one], kv.value_dim)
            if len(valid):
                mine = self._with([x[one] for x in self._read_besides])
                found = mine._rest_from(first, own, keys, kv[one], valid)
                blind = empty_partial(q[one, :, : len(rows) - len(valid)], kv.value_dim)
                part = Partial(
                    torch.cat([blind.out.to(found.out.dtype), found.out], 2),
                    torch.cat([blind.lse.to(found.lse.dtype), found.lse], 2),
                )
            parts.append(part)
        return Partial(torch.cat([p.out for p in parts]), torch.cat([p.lse for p in parts]))

    @property
    def _read_besides(self) -> list[KV]:
        """What is read besides the keys of the sequence: the levels, then the anchor."""
        return [*self.levels, *([] if self.anchor is None else [self.anchor])]

    def _with(self, besides: list[KV]) -> Summarised:
        """The same with another ``_read_besides``."""
        levels = besides if self.anchor is None else besides[:-1]
        return replace(self, levels=tuple(levels), anchor=None if self.anchor is None else besides[-1])

    def _rest_from(self, first: int, q: Tensor, keys: Keys, kv: KV, rows: range) -> Partial:
        """``_rest`` for batch rows that begin at position ``first``."""
        at = torch.arange(rows.start, rows.stop, device=q.device)
        behind = self._behind(at + 1 - first)  # [R]
        fewest = self._finished(rows[0] + 1 - first)
        low = keys.held(first + self.block * fewest)
        high = keys.held(max(0, rows[-1] + 1 - self._near))
        parts = [empty_partial(q, kv.value_dim)]
        if low < high:
            read = None
            if len(rows) > 1:
                places = keys.places()[low:high]
                read = places >= (first + self.block * behind)[:, None]
                read &= places <= (at - self._near)[:, None]
            parts.append(_masked(q, kv[:, :, low:high], keys, read))
        anchored, bits, some = self._share(keys, rows[-1] + 1 - first)
        if self.anchor is not None and anchored:
            read = None if fewest else (behind > 0)[:, None].expand(-1, len(anchored))
            parts.append(_masked(q, self.anchor[:, :, anchored.start : anchored.stop], keys, read))
        if some:
            at = torch.arange(some.start, some.stop, device=q.device)
            read = None if some.stop <= fewest >> self._top else at < (behind >> self._top)[:, None]
            part = _masked(q, self.levels[-1][:, :, some.start : some.stop], keys, read)
            parts.append(Partial(part.out, part.lse + self.bias[-1]))
        lower = [level for level in bits if self.levels[level].length]
        return merge(*parts, *(self._of_bit(level, q, keys, behind) for level in lower))

    def _share(self, keys: Keys, seen: int) -> tuple[range, range, range]:
        """What this rank reads of the summaries, for queries that see up to ``seen`` keys: keys of the
        anchor, levels below the last, and entries of the last level."""
        behind, top, left = self._finished(seen), self._top, self._replaced
        counts = self._anchored if behind else 0, top, max(0, (behind >> top) - left)
        share = range(sum(counts)) if keys.peers is None else keys.peers.share(sum(counts))
        found, begin = [], 0
        for count, offset in zip(counts, (0, 0, left), strict=True):
            a, b = (min(max(n - begin, 0), count) + offset for n in (share.start, share.stop))
            found.append(range(a, b))
            begin += count
        anchored, bits, some = found
        return anchored, bits, some

    def _of_bit(self, level: int, q: Tensor, keys: Keys, behind: Tensor) -> Partial:
        """Attention over one entry of a level, for the queries in whose ``behind`` [R] its bit is set."""
        kv = self.levels[level]
        (b, h, r, d), hkv = q.shape, kv.num_kv_heads
        wide = torch.promote_types(q.dtype, torch.float32)
        read = (behind >> level & 1) == 1
        entry = ((behind >> level) - 1).clamp(min=0).expand(b, hkv, r)
        k, v = (x.to(wide).masked_fill(~read[:, None], 0) for x in kv.gather(entry).dense())
        lse = (q.reshape(b, hkv, h // hkv, r, d).to(wide) * k[:, :, None]).sum(-1) * keys.softmax.scale
        if keys.softmax.softcap is not None:
            lse = keys.softmax.softcap * torch.tanh(lse / keys.softmax.softcap)
        lse = (lse + self.bias[level]).masked_fill(~read, -torch.inf)  # [B, Hkv, G, R]
        return Partial(v[:, :, None].expand(*lse.shape, -1).flatten(1, 2), lse.flatten(1, 2))


def _rest_of(q: Tensor, selection: Summarised, keys: Keys, rows: range) -> Partial:
    """``Summarised._rest``. With a gradient it is computed again in the backward pass, so that no weights are
    kept of a tile's queries and what they read."""
    kv = keys.kv
    if not (torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad)):
        return selection._rest(keys, rows, q, kv)

    def again(q: Tensor, k: Tensor, v: Tensor, *entries: Tensor) -> Partial:
        pairs = zip(entries[::2], entries[1::2], strict=True)
        return selection._with([KV(*pair) for pair in pairs])._rest(keys, rows, q, KV(k, v))

    tensors = [x for part in (kv, *selection._read_besides) for x in part.dense()]
    return checkpoint(again, q, *tensors, use_reentrant=False)


_IMPLS: Impls = {"reference": _rest_of, "eager": _rest_of}


def _masked(q: Tensor, kv: KV, keys: Keys, read: Tensor | None) -> Partial:
    """Attention of q [B, H, R, D] over kv [B, Hkv, M] where ``read`` [R, M] is true; None: everywhere."""
    h, hkv = q.shape[1], kv.num_kv_heads
    mask = None if read is None else read.repeat(h // hkv, 1)[None, None]
    part = kernel.attend(kernel.fold_groups(q, hkv), kv, keys.softmax, mask=mask, wide=True)
    return kernel.unfold_groups(part, h, q.shape[2])
