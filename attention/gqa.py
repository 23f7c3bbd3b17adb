"""One selection for the query heads that share a KV head (grouped-query attention)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .keys import Peers
from .ops.rows import gather_rows

_AT_A_TIME = 1 << 19  # scores of query heads that are computed at a time on the CPU


def group_scores(logits: Tensor, visible: Tensor | None, how: str, peers: Peers | None = None) -> Tensor:
    """Estimated logits [B, Hkv, G, T, N] -> scores [B, Hs, T, N] float32, -inf where ``visible`` ([B or 1, T,
    N]) is False.

    how: "sum" or "max" over the group of each head's estimated softmax probabilities (logits of different
    heads are not comparable, shares of attention are), or "none": the logits of each query head.
    peers: the ranks that hold the other keys, where the N entries are single keys and not all of them.
    """
    b, hkv, group, t, n = logits.shape
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    if how == "none" or group == 1:
        return logits.reshape(b, hkv * group, t, n)
    share = torch.softmax(logits, -1) if peers is None else peers.softmax(logits)
    share = share.sum(2) if how == "sum" else share.amax(2)
    return share if visible is None else share.masked_fill(~visible[:, None], -torch.inf)


def by_heads(rank: Callable[[Tensor, Tensor], Tensor], q: Tensor, entries: Tensor) -> Tensor:
    """``rank`` of queries q [B, H, T, any] and entries [B, Hkv, N, any], whose result is [B, Hs, T, N].

    On the CPU it is called for some KV heads at a time: what it computes for each query head stays in cache,
    and asking the system for the memory of all heads in each step would cost as much as the sums.
    """
    b, h, t, _ = q.shape
    hkv, n = entries.shape[1:3]
    few = max(1, _AT_A_TIME * hkv // max(1, b * h * t * n)) if q.device.type == "cpu" else hkv
    if few >= hkv:
        return rank(q, entries)
    parts = zip(q.split(few * h // hkv, 1), entries.split(few, 1), strict=True)
    return torch.cat([rank(*part) for part in parts], 1)


def gather_head_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, Hkv, T, D] at rows [B, Hs, R], whose heads are those of x or the query heads of their groups:
    [B, Hs, R, D]."""
    parts = [gather_rows(x, part) for part in rows.unflatten(1, (x.shape[1], -1)).unbind(2)]
    return torch.stack(parts, 2).flatten(1, 2)


def reduce_group(shares: Tensor, how: str) -> Tensor:
    """Shares [B, Hkv, G, ...] -> [B, Hs, ...]: the "sum" or the "max" over each group, or one per query head
    ("none")."""
    if how == "none":
        return shares.flatten(1, 2)
    return shares.sum(2) if how == "sum" else shares.amax(2)


def side_by_side(q: Tensor, num_kv_heads: int) -> Tensor:
    """Queries [B, H, T, D] -> [B, Hkv, T, G * D], those of a group's heads one behind the other."""
    return q.unflatten(1, (num_kv_heads, -1)).transpose(2, 3).flatten(3)
