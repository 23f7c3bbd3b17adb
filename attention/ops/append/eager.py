"""``append`` by writes in place. The length is read on the host: on CUDA that is a wait."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kv import KV
from .beside import Kept, Labels, Pages


def append(
    k: Tensor,
    v: Tensor,
    kv: KV,
    length: Tensor,
    *,
    start: Tensor | None,
    pages: Pages | None,
    labels: Labels | None,
    kept: Kept | None,
) -> None:
    at = int(length) - 1
    for buffer, x in zip(kv.stored, kv.encode(k, v).stored, strict=True):
        buffer[:, :, at] = x[:, :, 0]
    if pages is not None:
        starts = [0] * k.shape[0] if start is None else start.tolist()
        for b, first in enumerate(starts):
            page, inside = divmod(at - first, pages.size)
            if page < 0:
                continue  # the row has no token yet
            high, low = pages.entries[b, :, page].chunk(2, -1)
            new = k[b, :, 0]
            high.copy_(new if inside == 0 else torch.maximum(high, new))
            low.copy_(new if inside == 0 else torch.minimum(low, new))
    if labels is not None:
        chosen = labels.channels[None].expand(k.shape[0], -1, -1)
        labels.entries[:, :, at] = k[:, :, 0].gather(2, chosen)
    if kept is not None:
        size = kept.tokens.shape[2]
        slot = size - 1 - (max(at - int(kept.since), 1) - 1) % size
        kept.tokens[:, :, slot] = at
        for buffer, x in zip(kept.kv.stored, (k, v), strict=True):
            buffer[:, :, slot] = x[:, :, 0]
