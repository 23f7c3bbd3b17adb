"""The definition of ``estimate_topk``, row by row and head by head, in float32 (float64 for float64 q)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...lists import TokenLists
from ...softmax import Softmax


def estimates(q: Tensor, entries: Tensor, softmax: Softmax, channels: Tensor | None, reduce: str) -> Tensor:
    """q [G, D] of one group and entries [n, any] of its KV head -> scores [1 or G, n]; channels [r]."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, entries = q.to(wide), entries.to(wide)
    if channels is None:
        high, low = entries.chunk(2, -1)
        logits = torch.maximum(q[:, None] * high, q[:, None] * low).sum(-1)
    else:
        logits = q[:, channels] @ entries.T
    logits = logits * softmax.scale
    if softmax.softcap is not None:
        logits = softmax.softcap * torch.tanh(logits / softmax.softcap)
    if reduce == "none" or len(q) == 1:
        return logits
    shares = torch.softmax(logits, -1)
    return shares.sum(0, keepdim=True) if reduce == "sum" else shares.amax(0, keepdim=True)


def estimate_topk(
    q: Tensor,
    entries: Tensor,
    softmax: Softmax,
    length: Tensor,
    k: int | None,
    *,
    fraction: float | None,
    page: int | None,
    channels: Tensor | None,
    reduce: str,
    start: Tensor | None,
) -> TokenLists:
    total, hkv = int(length), entries.shape[1]
    lists = []
    for b, heads in enumerate(q[:, :, 0].unflatten(1, (hkv, -1))):
        first = 0 if start is None else int(start[b])
        size = max(1, round((fraction or 0.0) * (total - first))) if k is None else k
        for head, group in enumerate(heads):
            own, mine = entries[b, head], None if channels is None else channels[head]
            if page is None:
                ranked = estimates(group, own[first:total], softmax, mine, reduce)
            else:
                last = (total - first - 1) // page
                ranked = estimates(group, own[:last], softmax, None, reduce)
            for scores in ranked:
                best = torch.sort(scores, descending=True, stable=True).indices
                if page is None:
                    lists.append(first + best[:size].sort().values)
                    continue
                pages = last + 1 if size >= total - first else max(1, size // page)
                places = torch.cat([best[: pages - 1].sort().values, torch.tensor([last], device=q.device)])
                tokens = (places[:, None] * page + torch.arange(page, device=q.device)).flatten() + first
                lists.append(tokens[tokens < total])
    counts = torch.tensor([len(one) for one in lists], dtype=torch.int32, device=q.device)
    tokens = torch.zeros(len(lists), max(map(len, lists)), dtype=torch.long, device=q.device)
    for row, one in zip(tokens, lists, strict=True):
        row[: len(one)] = one
    heads = len(lists) // q.shape[0]
    return TokenLists(tokens=tokens.view(-1, heads, 1, tokens.shape[1]), counts=counts.view(-1, heads, 1))
