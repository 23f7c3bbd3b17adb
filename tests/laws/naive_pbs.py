"""PBS-Attn (2510.21270) written from its definition, one head and one query block at a time, in float64.

Nothing of the package is used here. Ties go to the lowest position, or to the lowest block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import softmax


def importance(q: Tensor, k: Tensor, count: int, scale: float) -> list[float]:
    """q [Tq, D], the last queries of keys k [n, D] -> the mean attention of the last ``count`` of them."""
    n, total = k.shape[0], torch.zeros(k.shape[0], dtype=torch.float64)
    last = q[-count:].double()
    for i, query in enumerate(last):
        seen = n - len(last) + i + 1
        total[:seen] += softmax(k[:seen].double() @ query * scale)
    return (total / len(last)).tolist()


def new_order(weight: list[float], segment: int) -> list[int]:
    """Positions, those of each complete segment sorted by weight."""
    order: list[int] = []
    for a in range(0, len(weight), segment):
        places = range(a, min(a + segment, len(weight)))
        complete = len(places) == segment
        order += sorted(places, key=lambda i: (-weight[i], i)) if complete else places
    return order


def mean_score(q: Tensor, k: Tensor, scale: float) -> float:
    """The logit of a query block [b, D] for a key block [b, D]."""
    return float(q.double().mean(0) @ k.double().mean(0)) * scale


def shares(q: Tensor, blocks: list[Tensor], scale: float) -> list[float]:
    """A query block's softmax over the key blocks' pooled logits."""
    return softmax(torch.tensor([mean_score(q, k, scale) for k in blocks], dtype=torch.float64)).tolist()


def antidiagonal_shares(q: Tensor, blocks: list[Tensor], scale: float, stride: int) -> list[float]:
    """XAttention's (2503.16428): a softmax over the means along the antidiagonals of stride x stride squares
    (what a square has not got of queries counts as 0), its probabilities added up per key block."""
    total = torch.zeros(len(blocks), dtype=torch.float64)
    for a in range(0, q.shape[0], stride):
        row = []
        for block in blocks:
            for c in range(0, block.shape[0], stride):
                pairs = [
                    (a + stride - 1 - t, c + t) for t in range(stride) if a + stride - 1 - t < q.shape[0]
                ]
                along = [float(q[i].double() @ block[j].double()) for i, j in pairs]
                row.append(sum(along) * scale / stride)
        total += softmax(torch.tensor(row, dtype=torch.float64)).view(len(blocks), -1).sum(1)
    return total.tolist()


def smallest_set(weight: list[float], mass: float) -> set[int]:
    goal, held, taken = mass * sum(weight), 0.0, set()
    for j in sorted(range(len(weight)), key=lambda j: (-weight[j], j)):
        if held >= goal or weight[j] == 0:
            break
        taken.add(j)
        held += weight[j]
    return taken


def pbs(
    q: Tensor, k: Tensor, *, mass: float, block: int, segment: int, select: str, stride: int, gqa_reduce: str,
    scale: float,
) -> list[list[set[int]]]:  # fmt: skip
    """q [G, Tq, D], the last queries of one KV head's keys k [n, D] -> [query block][head] the keys it reads,
    later ones than its queries not left out."""
    group, tq, n = q.shape[0], q.shape[1], k.shape[0]
    past = n - tq
    weights = [importance(head, k, block, scale) for head in q]
    orders = [new_order(weight, segment) for weight in _together(weights, gqa_reduce)]
    keys = [[order[a : a + block] for a in range(0, n, block)] for order in orders]  # [order][block]
    result = []
    for a in range(0, tq, block):
        z = min(a + block, tq)
        segments = range((past + a) // segment, (past + z - 1) // segment + 1)
        own = {i for s in segments for i in range(s * segment, min((s + 1) * segment, n))}
        earlier = segments[0] * segment // block
        scored = []
        for head in range(group):
            blocks = [k[places] for places in keys[head if gqa_reduce == "none" else 0][:earlier]]
            if select == "mean":
                scored.append(shares(q[head, a:z], blocks, scale) if blocks else [])
            else:
                scored.append(antidiagonal_shares(q[head, a:z], blocks, scale, stride) if blocks else [])
        per_head = []
        for blocks, weight in zip(keys, _together(scored, gqa_reduce), strict=True):
            taken = smallest_set(weight, mass) | {j for j, places in enumerate(blocks) if 0 in places}
            per_head.append(own | {i for j in taken for i in blocks[j]})
        result.append(per_head if gqa_reduce == "none" else per_head * group)
    return result


def _together(per_head: list[list[float]], gqa_reduce: str) -> list[list[float]]:
    if gqa_reduce == "none":
        return per_head
    return [[sum(x) if gqa_reduce == "sum" else max(x) for x in zip(*per_head, strict=True)]]
