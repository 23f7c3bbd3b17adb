"""Selections written from the methods' definitions, a row and a head at a time, in float64, as Python sets.

Nothing of the package is used here. Queries are those of one KV head's group; ties go to the lowest position.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    weights = torch.exp(x.double() - x.double().max())
    return weights / weights.sum()


def best(scores: Tensor, count: int) -> list[int]:
    """The ``count`` highest, best first."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def combined(logits: Tensor, gqa_reduce: str) -> Tensor:
    """[G, N] logits of a group's heads -> [N]: the sum or the max over heads of each head's softmax."""
    shares = torch.stack([softmax(row) for row in logits])
    return shares.sum(0) if gqa_reduce == "sum" else shares.amax(0)


def attention(q: Tensor, k: Tensor, v: Tensor, read: set[int], scale: float) -> Tensor:
    """One query head over the keys at ``read``."""
    places = sorted(read)
    return softmax(k[places].double() @ q.double() * scale) @ v[places].double()


@dataclasses.dataclass
class RecycledRow:
    """Recycled Attention (2411.05787) for one row: its sets, step by step, every KV head by itself.

    ranked: what is left of the last full step's top k, best first; newcomers: the tokens since, oldest first.
    """

    k: int
    stride: int
    dynamic: bool
    qc: int
    s: float
    gqa_reduce: str
    scope: str
    pool: int
    scale: float
    heads: int  # KV heads

    def __post_init__(self) -> None:
        self.ranked: list[list[int]] = [[] for _ in range(self.heads)]
        self.newcomers: list[list[int]] = [[] for _ in range(self.heads)]
        self.since = [0] * self.heads
        self.last_q: list[Tensor | None] = [None] * self.heads
        self.has_set = False

    def prefilled(self, q: Tensor, keys: Tensor) -> None:
        """q [Hkv, G, D], the last prompt query; keys [Hkv, n, D], the row's own."""
        self.has_set = keys.shape[1] > self.k
        if self.has_set:
            for head in range(self.heads):
                self._rebuild(head, q, keys)

    def cropped(self) -> None:
        self.has_set = False

    def step(self, q: Tensor, keys: Tensor) -> list[set[int]]:
        """The positions that each KV head reads for the newest token."""
        n = keys.shape[1]
        everything = set(range(n))
        if n <= self.k:
            self.has_set = False
            return [everything] * self.heads
        if not self.has_set:
            self.has_set = True
            full = [True] * self.heads
        else:
            self.since = [clock + 1 for clock in self.since]
            full = self._full(q)
        reads = []
        for head in range(self.heads):
            if full[head]:
                self._rebuild(head, q, keys)
                reads.append(everything)
                continue
            if self.ranked[head]:
                self.ranked[head].pop()
            else:
                self.newcomers[head].pop(0)
            self.newcomers[head].append(n - 1)
            reads.append({*self.ranked[head], *self.newcomers[head]})
        return reads

    def _full(self, q: Tensor) -> list[bool]:
        if not self.dynamic:
            return [clock >= self.stride for clock in self.since]
        similar = []
        for head in range(self.heads):
            last = self.last_q[head]
            assert last is not None
            cosines = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(q[head], last, strict=True)]
            similar.append(float(torch.stack(cosines).mean()))
        if self.scope == "layer":
            similar = [sum(similar) / self.heads] * self.heads
        return [
            clock % self.qc == 0 and value < self.s for clock, value in zip(self.since, similar, strict=True)
        ]

    def _rebuild(self, head: int, q: Tensor, keys: Tensor) -> None:
        scores = combined(q[head].double() @ keys[head].double().T * self.scale, self.gqa_reduce)
        half = self.pool // 2
        near = torch.stack([scores[max(0, i - half) : i + half + 1].max() for i in range(len(scores))])
        self.ranked[head], self.newcomers[head] = best(near, self.k), []
        self.since[head], self.last_q[head] = 0, q[head].double().clone()


def quest(q: Tensor, k: Tensor, *, size: int, page: int, gqa_reduce: str, scale: float) -> list[set[int]]:
    """Quest (2406.10774): q [G, D] over one head's keys k [n, D] -> what each query head reads.

    The page being filled is always read; the others are ranked by their bounds, shared as softmax over them.
    """
    n = k.shape[0]
    if size >= n:
        return [set(range(n))] * len(q)
    pages = [list(range(a, min(a + page, n))) for a in range(0, n, page)]
    own, others = pages[-1], pages[:-1]
    count = max(1, size // page) - 1
    if count == 0:
        return [set(own)] * len(q)
    low = torch.stack([k[p].double().amin(0) for p in others])
    high = torch.stack([k[p].double().amax(0) for p in others])
    bounds = torch.stack([torch.maximum(x * low, x * high).sum(-1) for x in q.double()]) * scale
    per_head = list(bounds) if gqa_reduce == "none" else [combined(bounds, gqa_reduce)] * len(q)
    return [{*own, *(i for p in best(scores, count) for i in others[p])} for scores in per_head]


def _rounded_label(label: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits numbers from the smallest one on, which lie a step apart; that one and the step
    are bfloat16."""
    zero = label.min().bfloat16().float()
    step = ((label.max() - zero) / (2**bits - 1)).bfloat16().float()
    grid = zero.double() + step.double() * torch.arange(2**bits)
    return grid[(label.double()[:, None] - grid).abs().argmin(-1)]


def double_sparsity(
    q: Tensor,
    k: Tensor,
    channels: list[int],
    *,
    size: int,
    gqa_reduce: str,
    scale: float,
    bits: int | None = None,
) -> list[set[int]]:
    """Double Sparsity (2408.07092): labels are the calibrated channels of q and k, on raw logits; those of k
    rounded to ``bits``."""
    if size >= k.shape[0]:
        return [set(range(k.shape[0]))] * len(q)
    labels = k[:, channels].double()
    if bits is not None:
        labels = torch.stack([_rounded_label(label, bits) for label in k[:, channels].float()])
    logits = q[:, channels].double() @ labels.T * scale
    per_head = list(logits) if gqa_reduce == "none" else [combined(logits, gqa_reduce)] * len(q)
    return [set(best(scores, size)) for scores in per_head]


def block_topk(
    q: Tensor, k: Tensor, *, past: int, block: int, k_tokens: int | None, fraction: float | None,
    gqa_reduce: str, scale: float,
) -> list[list[set[int]]]:  # fmt: skip
    """Mean-pooled blocks: q [G, Tq, D], k [n, D] -> the key blocks each query head reads, per query block.

    A query block reads the first key block, those it lies in itself, and the best of the others up to the
    budget. Scores are shared over the heads as softmax over the key blocks before its own.
    """
    n, result = k.shape[0], []
    means = torch.stack([k[a : a + block].double().mean(0) for a in range(0, n, block)])
    for a in range(0, q.shape[1], block):
        z = min(a + block, q.shape[1])
        pooled = q[:, a:z].double().mean(1)
        own = set(range((past + a) // block, (past + z - 1) // block + 1))
        seen = max(own) + 1
        size = max(2, k_tokens // block) if fraction is None else max(2, round(seen * fraction))
        forced = own | {0}
        before = min(own)
        logits = pooled @ means[:before].T * scale
        chosen = []
        for head in range(len(q)):
            scores = logits[head] if gqa_reduce == "none" or before == 0 else combined(logits, gqa_reduce)
            ranked = [j for j in best(scores, before) if j not in forced]
            chosen.append(forced | set(ranked[: max(0, size - len(forced))]))
        result.append(chosen)
    return result
