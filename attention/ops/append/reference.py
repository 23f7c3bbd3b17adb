"""The definition of ``append``: what is kept beside the keys is computed from all of them."""

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
    total = int(length)
    for buffer, x in zip(kv.stored, kv.encode(k, v).stored, strict=True):
        buffer[:, :, total - 1 : total] = x
    keys = kv.k[:, :, :total]
    if pages is not None:
        for b in range(k.shape[0]):
            first = 0 if start is None else int(start[b])
            number = (total - 1 - first) // pages.size
            page = keys[b, :, first + number * pages.size :]
            pages.entries[b, :, number] = torch.cat([page.amax(1), page.amin(1)], -1)
    if labels is not None:
        for head, channels in enumerate(labels.channels):
            labels.entries[:, head, :total] = keys[:, head][..., channels]
    if kept is not None:
        size, steps = kept.tokens.shape[2], total - 1 - int(kept.since)
        slot = list(range(size - 1, -1, -1))[(steps - 1) % size]
        kept.tokens[:, :, slot] = total - 1
        for buffer, x in zip(kept.kv.stored, (k, v), strict=True):
            buffer[:, :, slot] = x[:, :, 0]
