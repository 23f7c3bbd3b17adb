"""Centroids of queries and keys: of a prompt's own keys, scaled to length 1 and moved as the sequence grows
(online k-means), or learned from a text, of any length."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..gqa import group_scores


def running_centroids(k: Tensor, clusters: int, segment: int, dtype: torch.dtype) -> Tensor:
    """Keys k [B, Hkv, Tk, D] -> the centroids after each complete segment of ``segment`` keys, at least one:
    [T, B, Hkv, C, D].

    They begin as C keys of the first segment, evenly spaced. After each segment a centroid is the mean of all
    keys that were nearest to it so far.
    """
    first = torch.arange(clusters, device=k.device) * segment // clusters
    mean = normalize(k[:, :, first.clamp(max=k.shape[2] - 1)].to(dtype), dim=-1)
    sums, counts, means = torch.zeros_like(mean), mean.new_zeros(*mean.shape[:3], 1), []
    number = torch.arange(clusters, device=k.device)
    for x in normalize(k[:, :, : k.shape[2] // segment * segment].to(dtype), dim=-1).split(segment, 2):
        nearest = (x @ mean.transpose(2, 3)).argmax(3)  # the first of equals
        member = (nearest[..., None] == number).to(dtype).transpose(2, 3)  # [B, Hkv, C, segment]
        sums, counts = sums + member @ x, counts + member.sum(3, keepdim=True)
        mean = torch.where(counts > 0, normalize(sums, dim=-1), mean)
        means.append(mean)
    return torch.stack(means or [mean])


class Centroids(nn.Module):
    """The learned centroids of one layer, ``centroids`` [Hkv, C, D], which are not scaled to length 1 after
    the start of training (Routing Transformer, 2003.05997)."""

    def __init__(self, centroids: Tensor) -> None:
        super().__init__()
        self.centroids = nn.Parameter(centroids)

    @staticmethod
    def random(num_kv_heads: int, clusters: int, head_dim: int) -> Centroids:
        """Random directions, which training begins with, as in the paper."""
        return Centroids(normalize(torch.randn(num_kv_heads, clusters, head_dim), dim=-1))

    def loss(self, q: Tensor, k: Tensor) -> Tensor:
        """The commitment loss: the mean squared distance between the queries q [B, H, T, D] and keys k [B,
        Hkv, T, D], all scaled to length 1, and the centroid mu with the largest x . mu. A scalar.

        A step of gradient descent moves a centroid towards the mean of its members, as the paper's moving
        average does, and is the same where several processes train with their gradients summed. Ours: a
        centroid without members is drawn to the vector with the largest x . mu. In the paper every centroid
        takes the w tokens nearest to it, so none is unused.
        """
        mu = self.centroids
        wide = torch.promote_types(k.dtype, mu.dtype)
        x = torch.cat([q.unflatten(1, (k.shape[1], -1)).flatten(2, 3), k], 2).transpose(0, 1).flatten(1, 2)
        near = normalize(x.to(wide), dim=-1) @ mu.to(wide).transpose(1, 2)  # [Hkv, vectors, C]
        squares = mu.to(wide).square().sum(2)  # [Hkv, C]
        best, nearest = near.max(2)
        apart = 1 - 2 * best + squares.gather(1, nearest)
        unused = torch.ones_like(squares, dtype=torch.bool).scatter_(1, nearest, False)
        alone = (1 - 2 * near.amax(1) + squares).masked_fill(~unused, 0)
        return apart.mean() + alone.mean()


def routed(pooled: Tensor, known: Tensor, reduce: str) -> Tensor:
    """The centroid that each query block is routed to: pooled [B, H, n, D] are the blocks' mean queries,
    scaled to length 1, known [B, Hkv, n, C, D] the centroids that each may go to -> [B, Hs, n, D]. reduce: of
    the query heads of a group, as in ``group_scores``."""
    grouped = pooled.unflatten(1, (known.shape[1], -1)).transpose(2, 3)  # [B, Hkv, n, G, D]
    # As logits of layer-normalised vectors of length sqrt(D): sqrt(D) cos(q, mu).
    logits = (grouped @ known.transpose(3, 4)).transpose(2, 3) * pooled.shape[3] ** 0.5
    cluster = group_scores(logits, None, reduce).argmax(3)  # [B, Hs, n]
    heads = cluster.shape[1] // known.shape[1]
    index = cluster.unflatten(1, (-1, heads))[..., None, None].expand(-1, -1, -1, -1, 1, pooled.shape[3])
    return known[:, :, None].expand(-1, -1, heads, -1, -1, -1).gather(4, index)[..., 0, :].flatten(1, 2)
