"""Keys at regular distances: positions of one residue class are a sequence of their own, with a sliding
window in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..causal import causal_mask, positions
from ..keys import Keys
from ..kv import KV
from ..ops import kernel
from ..ops.flash import flash
from ..partial import Partial, empty_partial, merge
from .base import Pairs, Selection
from .window import first_keys

_PAIRS = 1 << 22  # of query and sink that are masked at a time


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
class Bands(Selection):
    """Keys whose distances behind a query lie in one of the ``bands``, no two of which share a distance, and
    the first ``sinks`` keys of its row."""

    called: ClassVar[str] = "Bands"

    bands: tuple[Band, ...]
    sinks: int = 0

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        """As ``Selection.run_prefill``, for rows that are not padded: exactly the keys of the bands are
        read."""
        parts = [_band(q, keys, band, impl) for band in self.bands]
        sinks = min(self.sinks, keys.length)
        if sinks:
            parts.append(_sinks(q, keys, self, sinks))
        pairs = self.pairs(keys.past + rows.start, keys.past + rows.stop) * q.shape[0] * q.shape[1]
        return merge(*parts), pairs

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        begin, end = chunk
        places = torch.arange(end, device=device)
        first = torch.tensor(starts, device=device)[:, None]
        read = places < first + self.sinks
        for stride, near, far in self.bands:
            nearest = (places + near).clamp(
                min=begin
            )  # the first query that may read a key through this band
            nearest = nearest + (places - nearest) % stride
            inside = nearest < end
            read = read | (inside if far is None else inside & (nearest - places < far))
        return (read & (places >= first))[:, None].expand(-1, kv_heads, -1)

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        mask = causal_mask(tq, tk, start, batch, None if rows is None else rows.device, rows)
        places, cols = positions(tq, tk, mask.device, rows)
        inside = self.hold((places - cols).clamp(min=0))[None, None]
        return mask & (inside | first_keys(self.sinks, cols, start, batch))

    def hold(self, distance: Tensor) -> Tensor:
        """Whether keys at these distances, none below 0, lie in a band; bool like ``distance``."""
        held = torch.zeros_like(distance, dtype=torch.bool)
        for stride, near, far in self.bands:
            inside = (distance >= near) & (distance % stride == 0)
            held |= inside if far is None else inside & (distance < far)
        return held

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


def _band(q: Tensor, keys: Keys, band: Band, impl: str) -> Partial:
    """One band, a residue class of positions modulo its stride at a time.

    stride = 3, near = 3, far = 9        key   0 1 2 3 4 5 6 7 8
                                   query 6     x . . x . . .
                                   query 7     . x . . x . . .
                                   query 8     . . x . . x . . .
    """
    stride, near, far = band
    size = None if far is None else -((near - far) // stride)  # keys of the class that a query reads
    if size is not None and size < 1:
        return empty_partial(q, keys.kv.value_dim)
    skip = near // stride  # keys of the class that are too near
    if stride == 1 and skip == 0:
        return _class(q, keys.kv, size, keys, impl)
    result = empty_partial(q, keys.kv.value_dim)
    for first in range(keys.past, min(keys.past + stride, keys.length)):  # the first query of a class
        rows = slice(first - keys.past, None, stride)
        before = first // stride - skip  # keys of the class before this one that are far enough
        blind = max(0, -before)  # queries that see none of them
        mine = q[:, :, rows][:, :, blind:]
        if mine.shape[2] == 0:
            continue
        upto = before + blind + mine.shape[2]
        kv = keys.kv[:, :, first % stride :: stride][:, :, :upto]
        part = _class(mine.contiguous(), kv, size, keys, impl)
        result.out[:, :, rows][:, :, blind:] = part.out.to(result.out.dtype)
        result.lse[:, :, rows][:, :, blind:] = part.lse
    return result


def _class(q: Tensor, kv: KV, size: int | None, keys: Keys, impl: str) -> Partial:
    return flash(q, kv, keys.softmax, window=size, impl=impl)


def _sinks(q: Tensor, keys: Keys, index: Bands, sinks: int) -> Partial:
    """The first keys of the row, for the queries in none of whose bands they are."""
    h, tq, hkv = q.shape[1], q.shape[2], keys.kv.num_kv_heads
    far = max((keys.length if band.far is None else band.far) for band in index.bands)
    tile, parts = max(1, _PAIRS // (h // hkv * sinks)), []
    for a in range(0, tq, tile):
        rows = torch.arange(keys.past + a, min(keys.past + a + tile, keys.length), device=q.device)
        mask = None
        if keys.past + a - sinks + 1 < far:  # later queries have them all beyond their bands
            distance = rows[:, None] - torch.arange(sinks, device=q.device)
            mask = (distance >= 0) & ~index.hold(distance.clamp(min=0))  # [rows, sinks]
            mask = mask.repeat(h // hkv, 1)[None, None]
        part = kernel.attend(
            kernel.fold_groups(q[:, :, a : a + tile], hkv),
            keys.kv[:, :, :sinks],
            keys.softmax,
            mask=mask,
        )
        parts.append(kernel.unfold_groups(part, h, len(rows)))
    return Partial(torch.cat([p.out for p in parts], 2), torch.cat([p.lse for p in parts], 2))
