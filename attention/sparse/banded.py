"""The single keys that decode queries read of a pattern of regular distances."""

from __future__ import annotations

import torch

from ..keys import Keys
from ..selection import Bands, TokenIndex
from ..selection.ragged import counted_first


def banded_tokens(index: Bands, keys: Keys) -> TokenIndex:
    """The keys that each decode query reads, one by one, the query's own first."""
    device, length = keys.kv.device, keys.longest()
    ends = [length if band.far is None else min(band.far, length) for band in index.bands]
    near = torch.cat(
        [
            torch.arange(n, max(n, end), s, device=device)
            for (s, n, _), end in zip(index.bands, ends, strict=True)
        ]
    )
    first = torch.zeros(1, dtype=torch.long, device=device) if keys.start is None else keys.start
    rows = torch.arange(keys.past, keys.length, device=device)[:, None]
    sinks = (first[:, None] + torch.arange(index.sinks, device=device))[:, None]  # [B or 1, 1, sinks]
    distance = rows - sinks
    fresh = (distance >= 0) & ~index.hold(distance.clamp(min=0))  # [B or 1, Tq, sinks]
    chosen = torch.cat([(rows - near).expand(*fresh.shape[:2], -1), sinks.expand(*fresh.shape)], 2)
    read = torch.cat([rows - near >= first[:, None, None], fresh], 2)
    shape = (keys.kv.batch, keys.kv.num_kv_heads, keys.tq)
    tokens, counts = counted_first(chosen, read)
    return TokenIndex(
        tokens=tokens[:, None].expand(*shape, -1),
        counts=None if counts is None else counts[:, None].expand(shape),
    )
