"""Single keys for each decode query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..keys import Keys
from ..lists import TokenLists
from ..ops.decode import decode
from ..ops.gather_decode import gather_decode
from ..partial import Partial
from .base import Pairs, Selection, total
from .every import EveryKey
from .here import attend_recent, count_visible
from .ragged import counted_first


@dataclass(frozen=True, kw_only=True)
class TokenIndex(TokenLists, Selection):
    """Single keys read by each decode query, as ``TokenLists`` has them."""

    called: ClassVar[str] = "a TokenIndex"

    @staticmethod
    def ragged(
        candidates: Tensor, counted: Tensor, *, ascending: bool = False, full: Tensor | None = None
    ) -> TokenIndex:
        """An index of the candidates [B, Hs, Tq, K] that count, as ``counted_first`` arranges them."""
        tokens, counts = counted_first(candidates, counted, ascending=ascending)
        return TokenIndex(tokens=tokens, counts=counts, full=full)

    @property
    def mask_heads(self) -> int:
        return self.tokens.shape[1]

    def loads_shared_by(self, num_heads: int, num_kv_heads: int) -> int:
        return num_heads // self.tokens.shape[1]

    def number(self) -> Tensor:
        """[B, Hs, Tq] how many tokens of each query count."""
        if self.counts is not None:
            return self.counts
        return torch.full(self.tokens.shape[:3], self.tokens.shape[3], device=self.tokens.device)

    def run_decode(self, q: Tensor, keys: Keys, impl: str) -> tuple[Partial, Pairs]:
        if self.full is None or not bool(self.full.any()):
            part = gather_decode(q, keys.kv, self, keys.softmax, check=False, impl=impl)
            group = q.shape[1] // self.tokens.shape[1]
            return part, self.tokens.numel() * group if self.counts is None else total(self.counts, group)
        if bool(self.full.all()):
            return EveryKey().run_decode(q, keys, impl)
        return self._run_mixed(q, keys, self.full, impl)

    def _run_mixed(self, q: Tensor, keys: Keys, full: Tensor, impl: str) -> tuple[Partial, Pairs]:
        """Rows of one call in different phases of a method: the rows that read every visible key are taken
        one at a time, in place."""
        h, hs = q.shape[1], self.tokens.shape[1]
        group, hkv = h // hs, keys.kv.num_kv_heads
        part = gather_decode(q, keys.kv, self, keys.softmax, check=False, impl=impl)
        out, lse = part.out.clone(), part.lse.clone()
        if self.counts is None and full.device.type == "cpu":  # the host knows all of it
            read = torch.where(full, count_visible(keys)[:, None], self.tokens.shape[3])
        else:
            read = torch.where(full.to(q.device), keys.seen(), self.number())
        for b, s, t in full.nonzero().tolist():
            heads, kv = slice(s * group, (s + 1) * group), s * hkv // hs
            first, end = (keys.starts[b] if keys.starts else 0), keys.past + t + 1
            cut = (slice(b, b + 1), slice(kv, kv + 1), slice(first, end))
            one = decode(q[b : b + 1, heads, t : t + 1], keys.kv[cut], keys.softmax, impl=impl)
            out[b : b + 1, heads, t : t + 1] = one.out.to(out.dtype)
            lse[b : b + 1, heads, t : t + 1] = one.lse
        return Partial(out, lse), total(read, group)

    def run_decode_here(self, q: Tensor, keys: Keys) -> tuple[Partial, Pairs]:
        here = self.localised(keys.places())
        group = q.shape[1] // self.tokens.shape[1]
        part = gather_decode(q, keys.kv, here, keys.softmax, check=False)
        if self.full is None:
            return part, total(here.number(), group)
        rows = self.full.to(q.device)
        full = rows.repeat_interleave(group, 1)  # [B, H, Tq]
        whole = attend_recent(q, keys, None)
        lse = torch.where(full, whole.lse, part.lse)
        out = torch.where(full[..., None], whole.out.to(q.dtype), part.out.to(q.dtype))
        seen = count_visible(keys).to(q.device)[:, None]  # [B, 1, Tq]
        return Partial(out, lse), total(torch.where(rows, seen, here.number()), group)

    def localised(self, places: Tensor) -> TokenIndex:
        """Those of the selected tokens that are among ``places`` [N] (ascending positions), as an index of
        these N keys. ``full`` and ``gathered`` are left out."""
        n = places.shape[0]
        if n == 0:
            return TokenIndex(tokens=self.tokens[..., :0])
        found = torch.searchsorted(places, self.tokens.contiguous()).clamp_(max=n - 1)
        mine = places[found] == self.tokens
        if self.counts is not None:
            mine &= torch.arange(self.tokens.shape[3], device=places.device) < self.counts[..., None]
        return TokenIndex.ragged(found, mine, ascending=True)
