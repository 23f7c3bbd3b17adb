"""Routing Transformer without its training: queries read the keys nearest to their cluster's centroid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..budget import select_topk
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..gqa import group_scores
from ..keys import Keys
from ..lookahead import Lookahead
from ..method import AttentionMethod
from ..needs import Needs
from ..ops.pool import pool
from ..ops.scores import scores
from ..selection import BlockIndex, Index
from .centroids import running_centroids

_CPU, _DEVICE = 1 << 22, 1 << 26  # scores held at a time


@dataclass(frozen=True, kw_only=True)
class Routing(AttentionMethod):
    """A query belongs to the cluster with the largest q . mu and reads the w keys with the largest k . mu
    before it (Routing Transformer, 2003.05997), with centroids learned from the prompt's own keys.

    Vectors are scaled to the unit sphere, as in the paper. Each KV head keeps ``clusters`` centroids mu
    (``running_centroids``), which move after every complete segment of ``segment`` keys. They depend on the
    keys before a query alone, not on chunks or ranks. A block of ``block`` queries is routed by its mean. It
    reads k keys in all: the first ``sinks``, the last ``window`` of each query, its own block, and for the
    rest the keys nearest to the centroid. gqa_reduce: the query heads of a group are routed to one cluster by
    the "sum" or the "max" of their softmax over the clusters, or each is routed alone ("none").

    Departures: no training, hence no shared queries and keys, keys alone in the means, and a plain mean
    instead of one that forgets over training steps (0.999); a running top w among the keys before a query,
    where the paper takes each cluster's top w of the whole sequence, later keys included, and masks; local
    attention in every head, where the paper has local heads beside routing ones; sinks. Decode is dense.
    """

    name: ClassVar[str] = "routing"
    title: ClassVar[str] = "Routing Transformer, training-free"
    paper: ClassVar[str] = "2003.05997"

    k: int = 1024
    clusters: int = 16
    segment: int = 256
    block: int = 64
    window: int = 256
    sinks: int = 4
    gqa_reduce: str = "sum"

    def __post_init__(self) -> None:
        require(self, k=(1, None), clusters=(1, None), segment=(1, None), block=(1, None))
        require(self, window=(1, None), sinks=(0, None), gqa_reduce=("sum", "max", "none"))
        if self.clusters > self.segment:
            raise SpecError(
                "routing begins its centroids as keys of the first segment: clusters can be at most segment; "
                f"got clusters={self.clusters}, segment={self.segment}."
            )
        least = self.block + max(self.segment, self.window + self.sinks)
        if self.k < least:
            raise SpecError(
                f"routing takes k of at least block + segment and block + window + sinks, here {least}, "
                f"since queries before the end of the first segment read everything; got k={self.k}."
            )

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.of_block(self.block)

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    @property
    def block_multiple(self) -> int:
        return self.block

    def reads(self, queries: Queries) -> Cost:
        if queries.length <= self.k:
            return queries.cost()
        begin = (queries.seen - 1) // self.block * self.block
        end = (begin + self.block).clamp(max=queries.length)
        later = end - queries.seen  # of the query block's own keys, which it reads whole
        return queries.cost(end.clamp(max=self.k) - later, selection=queries.raw_keys(queries.length))

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if keys.length <= self.k:
            return None
        k, device = keys.read_all_keys(), q.device
        pooled = normalize(pool(q, self.block, mode="mean").to(_wide(q)), dim=-1)  # [B, H, Nq, D]
        means = running_centroids(k, self.clusters, self.segment, _wide(k))  # [T, B, Hkv, C, D]
        lengths = torch.linalg.vector_norm(k, dim=3, dtype=_wide(k)).clamp_(min=1e-12)  # [B, Hkv, Tk]
        begins = torch.arange(keys.past, keys.length, self.block, device=device)  # of each query block
        most = _CPU if device.type == "cpu" else _DEVICE
        step = max(1, most // (q.shape[0] * q.shape[1] * keys.length))
        blocks, counts = [], []
        for n in range(0, len(begins), step):
            begin = begins[n : n + step, None]  # [n, 1]
            end = min(keys.past + (n + step) * self.block, keys.length)
            centre = self._centre(pooled[:, :, n : n + step], means, begin[:, 0])  # [B, Hs, n, D]
            near = scores(centre, k[:, :, :end]) / lengths[:, :, None, None, :end]  # [B, Hkv, _, n, end]
            near = near.flatten(1, 2)
            place = torch.arange(end, device=device)
            forced = (place < self.sinks) | (place > begin - self.window)
            near = near.masked_fill(forced, torch.inf).masked_fill(place >= begin + self.block, -torch.inf)
            chosen, count = select_topk(near, self.k, self.k)
            if count is None:
                count = torch.full(chosen.shape[:3], chosen.shape[3], dtype=torch.int, device=device)
            blocks.append(pad(chosen, (0, self.k - chosen.shape[3])).int())
            counts.append(count)
        return BlockIndex(
            blocks=torch.cat(blocks, 2), counts=torch.cat(counts, 2), block_q=self.block, block_k=1
        )

    def _centre(self, pooled: Tensor, means: Tensor, begin: Tensor) -> Tensor:
        """The centroid that each query block is routed to: pooled [B, H, n, D], the blocks begin at ``begin``
        [n] -> [B, Hs, n, D]."""
        known = means[(begin // self.segment - 1).clamp(min=0)]  # [n, B, Hkv, C, D]
        known = known.permute(1, 2, 0, 3, 4)
        grouped = pooled.unflatten(1, (known.shape[1], -1)).transpose(2, 3)  # [B, Hkv, n, G, D]
        # As logits of layer-normalised vectors of length sqrt(D): sqrt(D) cos(q, mu).
        logits = (grouped @ known.transpose(3, 4)).transpose(2, 3) * pooled.shape[3] ** 0.5
        cluster = group_scores(logits, None, self.gqa_reduce).argmax(3)  # [B, Hs, n]
        heads = cluster.shape[1] // known.shape[1]
        index = cluster.unflatten(1, (-1, heads))[..., None, None].expand(-1, -1, -1, -1, 1, pooled.shape[3])
        return known[:, :, None].expand(-1, -1, heads, -1, -1, -1).gather(4, index)[..., 0, :].flatten(1, 2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
