"""Chunks of any length, written from the papers' definitions token by token in float64, as Python lists and
sets.

Nothing of the package is used here. Ties go to the lowest position.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .naive import best, softmax


def chunks_of(ends: list[bool], longest: int) -> list[list[int]]:
    """The tokens of each chunk; the last may be open."""
    chunks: list[list[int]] = []
    current: list[int] = []
    for t, end in enumerate(ends):
        current.append(t)
        if end or len(current) == longest:
            chunks.append(current)
            current = []
    return [*chunks, current] if current else chunks


@dataclasses.dataclass
class ChunkLLMRow:
    """ChunkLLM (2510.02361) for one row, every KV head by itself. wq [Hkv, d, G * D], wk [Hkv, d, D], wb
    [hidden], bias: the adapters."""

    k: int | None
    fraction: float | None
    alpha: float
    longest: int
    sinks: int
    wq: Tensor
    wk: Tensor
    wb: Tensor
    bias: float

    def __post_init__(self) -> None:
        self.sets: list[set[int]] | None = None
        self.chosen_at = 0
        self.choices = 0

    def ends(self, hidden: Tensor) -> list[bool]:
        return [1 / (1 + math.exp(-float(h @ self.wb + self.bias))) > self.alpha for h in hidden]

    def prefilled(self, q: Tensor, keys: Tensor, hidden: Tensor) -> None:
        """q [Hkv, G, D], the last prompt query; keys [Hkv, n, D], hidden [n, hidden] of the row's own."""
        self.sets = None
        if self.k is None or keys.shape[1] > self.k:
            self.choose(q, keys, hidden)

    def cropped(self) -> None:
        self.sets = None

    def choose(self, q: Tensor, keys: Tensor, hidden: Tensor) -> None:
        n = keys.shape[1]
        size = self.k if self.k is not None else max(1, round((self.fraction or 0) * n))
        chunks = chunks_of(self.ends(hidden), self.longest)
        self.sets, self.chosen_at = [], n
        self.choices += 1
        for head in range(len(keys)):
            query = self.wq[head] @ q[head].flatten()
            score = torch.stack([query @ (self.wk[head] @ keys[head, c].T).mean(1) for c in chunks])
            chosen = set(range(min(self.sinks, n))) | set(chunks[-1])
            for j in best(score, len(chunks)):
                for t in chunks[j]:
                    if len(chosen) < size:
                        chosen.add(t)
            self.sets.append(chosen)

    def step(self, q: Tensor, keys: Tensor, hidden: Tensor) -> list[set[int]]:
        """The positions that each KV head reads for the newest token."""
        n = keys.shape[1]
        everything = [set(range(n))] * len(keys)
        if self.k is not None and n <= self.k:
            self.sets = None
            return everything
        if self.sets is None:
            self.choose(q, keys, hidden)
            return everything
        if self.ends(hidden[-1:])[0] or n - self.chosen_at >= self.longest:
            self.choose(q, keys, hidden)
        return [chosen | set(range(self.chosen_at, n)) for chosen in self.sets]


def chunk_loss(
    q: Tensor,
    k: Tensor,
    hidden: Tensor,
    ends: Tensor,
    longest: int,
    scale: float,
    wq: Tensor,
    wk: Tensor,
    wb: Tensor,
    bias: Tensor,
) -> Tensor:
    """q [B, H, T, D], k [B, Hkv, T, D], hidden [B, T, hidden], ends [B, T] bool: every query is compared."""
    (batch, heads, length, _), kv_heads = q.shape, k.shape[1]
    group, terms = heads // kv_heads, []
    for b in range(batch):
        for t in range(length):
            chunks = chunks_of(ends[b, : t + 1].tolist(), longest)
            for head in range(kv_heads):
                queries = q[b, head * group : (head + 1) * group, t]
                shares = torch.stack([softmax(k[b, head, : t + 1] @ one * scale) for one in queries]).mean(0)
                truth = torch.stack([shares[c].sum() for c in chunks])
                query = wq[head] @ queries.flatten()
                logits = torch.stack([query @ (wk[head] @ k[b, head, c].T).mean(1) for c in chunks])
                gate = torch.log_softmax(logits * scale, 0)
                terms.append((truth * (truth.log() - gate)).sum())
    boundary = binary_cross_entropy_with_logits(hidden @ wb + bias, ends.double())
    return torch.stack(terms).mean() + boundary


# --- DHSA with learned boundaries -------------------------------------------------------------------


def boundary_logit(k: Tensor, at: int, hidden: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]) -> Tensor:
    """DHSA (2510.24606): of a boundary before key ``at`` of k [Hkv, n, D]; two layers of (weight, bias)."""
    sides = []
    for side in (k[:, at - 4 : at], k[:, at : at + 4]):
        mean = side.mean(1).flatten()
        sides.append(mean / (mean.square().mean() + 1e-6).sqrt())
    left, right = sides
    cosine = left @ right / (left.norm() * right.norm())
    features = torch.cat([left, right, (left - right).abs(), left * right, cosine[None]])
    return (out[0] @ (hidden[0] @ features + hidden[1]).clamp(min=0) + out[1])[0]


def learned_chunks(
    logits: dict[int, float], length: int, segment: int, least: int, apart: int
) -> list[range]:
    """Chunks of keys by the logits of their possible beginnings, each segment by itself."""
    begins = []
    for first in range(0, length, segment):
        taken = [first]
        for _ in range(segment // least - 1):
            free = [
                at
                for at in range(first + 4, min(first + segment - 3, length))
                if logits.get(at, -1.0) > 0
                and all(abs(at - other) > apart for other in (*taken, first + segment))
            ]
            if free:
                taken.append(max(free, key=lambda at: (logits[at], -at)))
        begins += sorted(taken)
    return [range(a, z) for a, z in zip(begins, [*begins[1:], length], strict=True)]


def learned_dhsa(
    q: Tensor,
    k: Tensor,
    chunks: list[range],
    *,
    past: int,
    size: int | None,
    fraction: float | None,
    block_q: int,
    block_k: int,
    local: int,
    gqa_reduce: str,
    scale: float,
) -> list[list[set[int]]]:
    """The tokens that each query head of a group reads, per block of queries. q [G, Tq, D], k [n, D]."""
    result = []
    for a in range(0, q.shape[1], block_q):
        z = min(a + block_q, q.shape[1])
        begin, end = past + a, past + z
        near = max(begin - local + 1, 0)
        ranked = [j for j, chunk in enumerate(chunks) if chunk[0] < near]
        scores = []
        for head in q[:, a:z]:
            query = head.mean(0) * math.sqrt(z - a)
            keys = [k[list(chunks[j])].mean(0) * math.sqrt(len(chunks[j])) for j in ranked]
            logits = torch.stack([query @ key for key in keys]) if keys else torch.zeros(0)
            logits = logits * scale / math.sqrt(block_q * block_k)
            scores.append(logits if gqa_reduce == "none" or not keys else softmax(logits))
        if gqa_reduce != "none":
            stacked = torch.stack(scores)
            scores = [stacked.sum(0) if gqa_reduce == "sum" else stacked.amax(0)] * len(scores)
        wanted = size if size is not None else round(end * (fraction or 0))
        per_head = []
        for one in scores:
            chosen = set(range(min(block_k, end))) | set(range(near, end))
            for j in best(one, len(ranked)):
                for t in chunks[ranked[j]]:
                    if len(chosen) < wanted and t < near:
                        chosen.add(t)
            per_head.append(chosen)
        result.append(per_head)
    return result


def boundary_loss(
    q: Tensor, k: Tensor, scale: float, hidden: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor]
) -> Tensor:
    """q [B, H, T, D], k [B, Hkv, T, D]; every query is compared."""
    (batch, heads, length, _), group = q.shape, q.shape[1] // k.shape[1]
    terms = []
    for b in range(batch):
        shares = torch.zeros(length, length, dtype=torch.float64)  # the mean over heads
        for h in range(heads):
            for t in range(length):
                shares[t, : t + 1] += softmax(k[b, h // group, : t + 1] @ q[b, h, t] * scale) / heads
        for at in range(4, length - 3):
            left, right = (shares[at + 3 :, side].sum() for side in (slice(at - 4, at), slice(at, at + 4)))
            label = 1 - torch.minimum(left, right) / torch.maximum(left, right)
            logit = boundary_logit(k[b], at, hidden, out)
            terms.append(binary_cross_entropy_with_logits(logit, label))
    return torch.stack(terms).mean()
