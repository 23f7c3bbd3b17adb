"""Static patterns and Routing Transformer written from their papers, a query at a time, as Python sets.

Nothing of the package is used here. Positions are counted from the row's first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import best, combined


def dilated(i: int, *, w: int, dilation: int, sinks: int) -> set[int]:
    """Causal neighbourhood attention (2403.04690): the w nearest of i's own residue class, itself first."""
    neighbours = [i - step * dilation for step in range(w)]
    return {j for j in neighbours if j >= 0} | set(range(min(sinks, i + 1)))


def strided(i: int, *, w: int, stride: int, reach: int | None, sinks: int) -> set[int]:
    """Sparse Transformers (1904.10509): A1 and A2 of the strided pattern, in one head."""
    local = {j for j in range(i + 1) if i - j < w}
    far = {j for j in range(i + 1) if (i - j) % stride == 0 and (reach is None or i - j < reach)}
    return local | far | set(range(min(sinks, i + 1)))


def holds(block: int, size: int, positions: set[int]) -> bool:
    return any(p // size == block for p in positions)


def a_shape(queries: range, *, w: int, sinks: int, block: int) -> set[int]:
    """MInference's A-shape (2407.02490) for a block of queries, in whole blocks: the blocks it reads."""
    last = max(queries) // block
    wanted = {j for i in queries for j in range(max(0, i - w + 1), i + 1)} | set(range(sinks))
    return {b for b in range(last + 1) if holds(b, block, wanted)}


def butterfly(i: int, stride: int | None) -> set[int]:
    """Flat block butterfly (2112.00029): the block, and those whose number differs in one binary digit."""
    digits = format(i, "b").zfill(40)
    partners = {i}
    for place in range(40):
        other = digits[:place] + ("0" if digits[place] == "1" else "1") + digits[place + 1 :]
        if stride is None or 2 ** (39 - place) < stride:
            partners.add(int(other, 2))
    return {j for j in partners if j <= i}


def routing(
    q: Tensor, k: Tensor, *, past: int, k_tokens: int, clusters: int, segment: int, block: int, window: int,
    sinks: int, gqa_reduce: str, learned: Tensor | None = None,
) -> list[list[tuple[set[int], list[float]]]]:  # fmt: skip
    """Routing Transformer (2003.05997): q [G, Tq, D], k [n, D] -> what each query head reads, per query
    block, and how near each key is to the centroid.

    Centroids are ``learned`` [C, D], or running means of the unit keys nearest to them, moved after every
    complete segment; a query block goes to the centroid nearest its mean query and reads the unit keys
    nearest that.
    """
    unit = torch.stack([x / x.norm() for x in k.double()])
    result = []
    for a in range(0, q.shape[1], block):
        z = min(a + block, q.shape[1])
        begin, end = past + a, past + z
        forced = {j for j in range(end) if j < sinks or j > begin - window}
        if begin < segment and learned is None:
            result.append([(set(range(end)), [0.0] * end)] * len(q))
            continue
        if learned is not None:
            centroids, moves = list(learned.double()), 0
        else:
            centroids = [unit[c * segment // clusters] for c in range(clusters)]
            moves = begin // segment
        members: list[list[Tensor]] = [[] for _ in range(clusters)]
        for s in range(moves):
            keys = unit[s * segment : (s + 1) * segment]
            nearest = [best(cosines, 1)[0] for cosines in keys @ torch.stack(centroids).T]
            for x, c in zip(keys, nearest, strict=True):
                members[c].append(x)
            for c in range(clusters):
                if members[c]:
                    mean = torch.stack(members[c]).mean(0)
                    centroids[c] = mean / mean.norm()
        pooled = [q[g, a:z].double().mean(0) for g in range(len(q))]
        cosines = torch.stack([x / x.norm() for x in pooled]) @ torch.stack(centroids).T
        logits = cosines * q.shape[2] ** 0.5  # of layer-normalised vectors
        per_head = list(logits) if gqa_reduce == "none" else [combined(logits, gqa_reduce)] * len(q)
        read = []
        for scores in per_head:
            mu = centroids[best(scores, 1)[0]]
            near = unit[:end] @ mu
            others = [j for j in best(near, end) if j not in forced]
            read.append((forced | set(others[: max(0, k_tokens - len(forced))]), near.tolist()))
        result.append(read)
    return result


def commitment(q: Tensor, k: Tensor, centroids: Tensor) -> Tensor:
    """The commitment loss of Routing Transformer for one row, q [H, T, D], k [Hkv, T, D], centroids [Hkv, C,
    D], and for each centroid that nothing belongs to its squared distance to the vector with the largest x .
    mu, meaned over all centroids."""
    group, distances, unused = len(q) // len(k), [], []
    for head, mu in enumerate(centroids):
        vectors = [x / x.norm() for x in [*q[head * group : (head + 1) * group].flatten(0, 1), *k[head]]]
        used = set()
        for x in vectors:
            c = int(torch.stack([x @ m for m in mu]).argmax())
            used.add(c)
            distances.append((x - mu[c]).square().sum())
        for c in set(range(len(mu))) - used:
            x = vectors[int(torch.stack([x @ mu[c] for x in vectors]).argmax())]
            unused.append((x - mu[c]).square().sum())
    return torch.stack(distances).mean() + sum(unused, mu.new_zeros(())) / centroids[..., 0].numel()
