"""Centroids of keys, moved as the sequence grows (online k-means on the unit sphere)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


def running_centroids(k: Tensor, clusters: int, segment: int, dtype: torch.dtype) -> Tensor:
    """Keys k [B, Hkv, Tk, D] -> the centroids after each complete segment of ``segment`` keys, at least one:
    [T, B, Hkv, C, D].

    They begin as C keys of the first segment, evenly spaced. After each segment a centroid is the mean of all
    keys that were nearest to it so far.
    """
    first = torch.arange(clusters, device=k.device) * segment // clusters
    mean = normalize(k[:, :, first.clamp(max=k.shape[2] - 1)].to(dtype), dim=-1)
    sums, counts, means = torch.zeros_like(mean), mean.new_zeros(*mean.shape[:3], 1), []
    for a in range(0, k.shape[2] - segment + 1, segment):
        x = normalize(k[:, :, a : a + segment].to(dtype), dim=-1)
        nearest = (x @ mean.transpose(2, 3)).argmax(3)  # the first of equals
        member = one_hot(nearest, clusters).to(dtype).transpose(2, 3)  # [B, Hkv, C, segment]
        sums, counts = sums + member @ x, counts + member.sum(3, keepdim=True)
        mean = torch.where(counts > 0, normalize(sums, dim=-1), mean)
        means.append(mean)
    return torch.stack(means or [mean])
