"""Routing Transformer on a frozen model: queries read the keys nearest to their cluster's centroid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from ..budget import select_topk
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..lookahead import Lookahead
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..ops.pool import pool
from ..ops.scores import scores
from ..selection import BlockIndex, Index
from .centroids import Centroids, routed, running_centroids

_CPU, _DEVICE = 1 << 22, 1 << 25  # scores held at a time


@dataclass(frozen=True, kw_only=True)
class Routing(AttentionMethod):
    """A query belongs to the cluster with the largest q . mu and reads the w keys with the largest k . mu
    before it (Routing Transformer, 2003.05997). Queries and keys are scaled to length 1.

    Each KV head has ``clusters`` centroids mu. centroids="prompt": learned from the prompt's own keys
    (``running_centroids``), they move after every complete segment of ``segment`` keys and depend on the keys
    before a query alone, not on chunks or ranks. centroids="learned": fixed ones from a recipe that ``farspan
    train`` makes (``Centroids``); ``segment`` is not used. A block of ``block`` queries is routed by its
    mean. It reads k keys in all: the first ``sinks``, the last ``window`` of each query, its own block, and
    for the rest the keys nearest to the centroid. gqa_reduce: the query heads of a group are routed to one
    cluster by the "sum" or the "max" of their softmax over the clusters, or each is routed alone ("none").

    Departures: no mean is subtracted from vectors, as the paper's LayerNorm (without scale) does; queries and
    keys are not shared, since the model is frozen; a running top w among the keys before a query, where the
    paper takes each cluster's top w of the whole sequence, later keys too, and masks; local attention in
    every head, not in some; sinks. The prompt's centroids are plain means of keys alone. Decode is dense.
    """

    name: ClassVar[str] = "routing"
    title: ClassVar[str] = "Routing Transformer"
    paper: ClassVar[str] = "2003.05997"
    trained_with: ClassVar[tuple[str, ...]] = ("centroids", "clusters")

    k: int = 1024
    clusters: int = 16
    segment: int = 256
    block: int = 64
    window: int = 256
    sinks: int = 4
    gqa_reduce: str = "sum"
    centroids: str = "prompt"
    recipe: str = ""
    learned: Centroids | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, k=(1, None), clusters=(1, None), segment=(1, None), block=(1, None), window=(1, None))
        require(self, sinks=(0, None), gqa_reduce=("sum", "max", "none"), centroids=("prompt", "learned"))
        if not self.trains and self.clusters > self.segment:
            raise SpecError(
                "routing begins its centroids as keys of the first segment: clusters can be at most segment; "
                f"got clusters={self.clusters}, segment={self.segment}."
            )
        least = self.block + max(0 if self.trains else self.segment, self.window + self.sinks)
        if self.k < least:
            raise SpecError(
                "routing takes k of at least block + window + sinks and, without learned centroids, block + "
                f"segment, here {least}; got k={self.k}."
            )

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.of_block(self.block)

    @property
    def needs(self) -> Needs:
        learned = {"centroids": ("num_kv_heads", self.clusters, "head_dim")}
        return Needs(keys=True, weights=learned if self.trains else {})

    @property
    def trains(self) -> bool:
        return self.centroids == "learned"

    @property
    def module(self) -> nn.Module | None:
        return self.learned

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        weights = layer.checked(self) if self.trains else {}
        return replace(self, learned=Centroids(layer.own(weights["centroids"]))) if weights else self

    def for_training(self, layer: LayerInfo) -> AttentionMethod | None:
        new = Centroids.random(layer.num_kv_heads, self.clusters, layer.head_dim)
        return replace(self, learned=new) if self.trains else super().for_training(layer)

    def distillation_loss(self, q: Tensor, keys: Keys) -> Tensor:
        assert self.learned is not None
        return self.learned.loss(q, keys.kv.k)

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
        k, device, wide = keys.read_all_keys(), q.device, torch.promote_types(q.dtype, torch.float32)
        pooled = normalize(pool(q, self.block, mode="mean").to(wide), dim=-1)  # [B, H, Nq, D]
        if self.trains:
            assert self.learned is not None, "for_layer was not called"
            means = self.learned.centroids.detach().to(wide).expand(1, len(k), -1, -1, -1)
        else:
            means = running_centroids(k, self.clusters, self.segment, wide)  # [T, B, Hkv, C, D]
        lengths = torch.linalg.vector_norm(k, dim=3, dtype=wide).clamp_(min=1e-12)  # [B, Hkv, Tk]
        on_cpu = device.type == "cpu"  # there ``scores`` widens the keys itself, in cache
        k = k if on_cpu else k.to(wide)
        begins = torch.arange(keys.past, keys.length, self.block, device=device)  # of each query block
        most = _CPU // q.shape[1] if on_cpu else _DEVICE // k.shape[1]
        step, blocks, counts = max(1, most // (q.shape[0] * keys.length)), [], []
        for n in range(0, len(begins), step):
            begin = begins[n : n + step, None]  # [n, 1]
            end = min(keys.past + (n + step) * self.block, keys.length)
            known = means[(begin[:, 0] // self.segment - 1).clamp(0, len(means) - 1)]  # [n, B, Hkv, C, D]
            centre = routed(pooled[:, :, n : n + step], known.permute(1, 2, 0, 3, 4), self.gqa_reduce)
            near = (scores(centre, k[:, :, :end]) / lengths[:, :, None, None, :end]).flatten(1, 2)
            place = torch.arange(end, device=device)
            forced = (place < self.sinks) | (place > begin - self.window)
            near = near.masked_fill(forced, torch.inf).masked_fill(place >= begin + self.block, -torch.inf)
            chosen, count = select_topk(near, self.k, self.k)
            blocks.append(pad(chosen, (0, self.k - chosen.shape[3])).int())
            every = chosen.new_full(chosen.shape[:3], chosen.shape[3], dtype=torch.int)
            counts.append(every if count is None else count)
        return BlockIndex(
            blocks=torch.cat(blocks, 2), counts=torch.cat(counts, 2), block_q=self.block, block_k=1
        )
