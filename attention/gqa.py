"""One selection for the query heads that share a KV head (grouped-query attention)."""

from __future__ import annotations

import torch
from torch import Tensor

from .keys import Peers
from .ops.rows import gather_rows

_AT_A_TIME = 1 << 19  # logits whose softmax is taken at a time on the CPU


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
    share = _shares(logits, how) if peers is None else reduce_group(peers.softmax(logits), how)
    return share if visible is None else share.masked_fill(~visible[:, None], -torch.inf)


def _shares(logits: Tensor, how: str) -> Tensor:
    """The softmax of logits [B, Hkv, G, T, N], reduced over each group. On the CPU some heads at a time: these
    stay in cache, and the process asks the system for less memory, which costs more there than the sums."""
    heads = logits.shape[1]
    if logits.device.type == "cpu":
        heads = max(1, _AT_A_TIME * heads // max(1, logits.numel()))
    parts = [reduce_group(torch.softmax(part, -1), how) for part in logits.split(heads, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


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
