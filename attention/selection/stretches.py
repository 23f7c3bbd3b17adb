"""Stretches of queries whose first query reads every key and chooses the keys of the others."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..causal import causal_mask
from ..keys import Keys
from ..kv import KV
from ..ops import kernel
from ..ops.flash import flash
from ..partial import Partial
from .base import Pairs, Selection
from .every import EveryKey

_CPU, _DEVICE = 1 << 22, 1 << 27  # numbers of gathered keys, or of logits, that are worked on at a time


@dataclass(frozen=True, kw_only=True)
class Stretches(Selection):
    """What recycled decode steps read, for all tokens of a text at once.

    A stretch begins at each of the positions first, first + stride, ... Its first query is a full step, which
    reads every key. The query ``j`` positions later reads the chosen keys of its stretch except the ``j``
    lowest-ranked ones, and the last ``K`` of the ``j`` tokens since the full step: K keys in all. Queries
    before ``first`` read every key. Rows are not padded.

    tokens: [B, Hkv, stretches, K] int64, the keys chosen by the full step of each stretch, highest rank
    first.

        K = 3, chosen a > b > c        keys   a b c   p p+1 p+2
                           query p + 1        x x .   .  x
                           query p + 2        x . .   .  x   x
    """

    called: ClassVar[str] = "Stretches"

    tokens: Tensor
    first: int
    stride: int

    @property
    def mask_heads(self) -> int:
        return self.tokens.shape[1]

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        """As ``Selection.run_prefill``. With a gradient, a few stretches at a time are computed again in the
        backward pass, so that no tensor has an entry for every pair of tokens."""
        parts = []
        if self.first > keys.past:
            before = q[:, :, : self.first - keys.past]
            parts.append(flash(before, keys.kv[:, :, : self.first], keys.softmax, impl=impl))
        count, size = self.tokens.shape[2:]
        whole = (keys.length - self.first) // self.stride  # the last stretch may be shorter
        widest = max(keys.length, self.stride * (size + self.stride), (size + self.stride) * q.shape[3])
        most = _CPU if q.device.type == "cpu" else _DEVICE
        step = max(1, most // (q.shape[0] * q.shape[1] * widest))
        bounds = sorted({*range(0, whole, step), whole, count})
        kv = KV(*keys.kv.dense())
        for a, z in itertools.pairwise(bounds):
            run = partial(self._attend, keys, range(a, z))
            part = (
                checkpoint(run, q, kv.k, kv.v, use_reentrant=False) if _learns(q, kv) else run(q, kv.k, kv.v)
            )
            parts.append(part)
        out = torch.cat([part.out.to(q.dtype) for part in parts], 2)
        return Partial(out, torch.cat([part.lse for part in parts], 2)), self._pairs(q, keys, rows)

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        return EveryKey().needed(chunk, starts, kv_heads, device)

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        b, heads, _, size = self.tokens.shape
        device = self.tokens.device
        places = torch.arange(tk - tq, tk, device=device)
        places = places if rows is None else places[rows.to(device)]
        since, stretch = self._since(places), ((places - self.first) // self.stride).clamp(min=0)
        kept = torch.arange(size, device=device) < size - since[:, None]  # [R, K], by rank
        chosen = torch.zeros(b, heads, len(places), tk + 1, dtype=torch.bool, device=device)
        chosen.scatter_(3, self.tokens[:, :, stretch].where(kept, tk), True)
        behind = places[:, None] - torch.arange(tk, device=device)
        recent = (behind >= 0) & (behind < since[:, None].clamp(max=size))
        full = (since == 0)[:, None]
        mask = causal_mask(
            tq, tk, start, b, device, torch.arange(tq, device=device) if rows is None else rows
        )
        return mask & (full | recent | chosen[..., :tk])

    def _since(self, places: Tensor) -> Tensor:
        """How many positions after the full step of its stretch each position is; 0: it reads every key."""
        return torch.where(places < self.first, 0, (places - self.first) % self.stride)

    def _pairs(self, q: Tensor, keys: Keys, rows: range) -> int:
        places = torch.arange(keys.past + rows.start, keys.past + rows.stop)
        read = torch.where(self._since(places) == 0, places + 1, self.tokens.shape[3])
        return int(read.sum()) * q.shape[0] * q.shape[1]

    def _attend(self, keys: Keys, stretches: range, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """The queries of some stretches, [B, H, n, D], which are all equally long."""
        begin = self.first + stretches.start * self.stride
        end = min(self.first + stretches.stop * self.stride, keys.length)
        width = (end - begin) // len(stretches)
        rows = q[:, :, begin - keys.past : end - keys.past].unflatten(2, (len(stretches), width))
        full = self._full(keys, rows[:, :, :, 0], k[:, :, :end], v[:, :, :end], begin)
        if width == 1:
            return full
        later = self._recycled(keys, stretches, rows[:, :, :, 1:], k[:, :, :end], v[:, :, :end], begin)
        out = torch.cat([full.out[:, :, :, None], later.out.to(full.out.dtype)], 3)
        lse = torch.cat([full.lse[..., None], later.lse], 3)
        return Partial(out.flatten(2, 3), lse.flatten(2, 3))

    def _full(self, keys: Keys, q: Tensor, k: Tensor, v: Tensor, begin: int) -> Partial:
        """The full steps q [B, H, n, D] at positions begin, begin + stride, ..."""
        (_, h, n, _), hkv = q.shape, k.shape[1]
        places = begin + self.stride * torch.arange(n, device=q.device)
        mask = torch.arange(k.shape[2], device=q.device) <= places[:, None]
        mask = mask.repeat(h // hkv, 1)[None, None]
        part = kernel.attend(kernel.fold_groups(q, hkv), KV(k, v), keys.softmax, mask=mask)
        return kernel.unfold_groups(part, h, n)

    def _recycled(self, keys: Keys, stretches: range, q: Tensor, k: Tensor, v: Tensor, begin: int) -> Partial:
        """The other steps q [B, H, n, width - 1, D] of the stretches -> out [B, H, n, width - 1, Dv]."""
        (b, h, n, later, _), hkv, size = q.shape, k.shape[1], self.tokens.shape[3]
        chosen = self.tokens[:, :, stretches.start : stretches.stop].flatten(2)
        read = KV(k, v).gather(chosen)

        def beside(x: Tensor, own: Tensor) -> Tensor:
            """Chosen and own keys of each stretch, [B * n, Hkv, size + later, D]."""
            local = own[:, :, begin:].unflatten(2, (n, later + 1))[:, :, :, 1:]
            joined = torch.cat([x.unflatten(2, (n, size)), local], 3)
            return joined.transpose(1, 2).flatten(0, 1)

        since = torch.arange(1, later + 1, device=q.device)[:, None]
        kept = torch.arange(size, device=q.device) < size - since
        newcomer = torch.arange(1, later + 1, device=q.device)
        mask = torch.cat([kept, (newcomer <= since) & (newcomer > since - size)], 1)
        part = kernel.attend(
            kernel.fold_groups(q.transpose(1, 2).flatten(0, 1), hkv),
            KV(beside(read.k, k), beside(read.v, v)),
            keys.softmax,
            mask=mask.repeat(h // hkv, 1)[None, None],
        )
        part = kernel.unfold_groups(part, h, later)
        return Partial(*(x.unflatten(0, (b, n)).transpose(1, 2) for x in part))


def _learns(q: Tensor, kv: KV) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad)
