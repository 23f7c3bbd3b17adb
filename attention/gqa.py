"""One selection for the query heads that share a KV head (grouped-query attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from .keys import Peers
from .ops.rows import gather_rows


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
