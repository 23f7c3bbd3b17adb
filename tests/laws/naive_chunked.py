"""CCA, Combiner and descriptors from their papers, a query at a time, in float64. Nothing of the package is
used here.

q [G, N, D], k and v [N, D]: one KV head of one row with its group of query heads. Each function returns the
output [G, N, D] and how many keys and summaries each query has read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Read = list[tuple[Tensor, Tensor, float]]  # key, value, what is added to the logit


def attend(q: Tensor, read: Read) -> Tensor:
    logits = torch.stack([q.double() @ k.double() / math.sqrt(len(q)) + bias for k, _, bias in read])
    return torch.softmax(logits, 0) @ torch.stack([v.double() for _, v, _ in read])


def pooled(query: Tensor, keys: Tensor, what: Tensor) -> Tensor:
    """what [n, D], weighed by the attention of ``query`` [D] over ``keys`` [n, D]."""
    weights = [torch.exp(query @ key / math.sqrt(len(query))) for key in keys.double()]
    total = torch.stack(weights).sum()
    return torch.stack([w / total * x for w, x in zip(weights, what.double(), strict=True)]).sum(0)


def run(q: Tensor, reads: list[Read]) -> tuple[Tensor, list[int]]:
    out = torch.stack([torch.stack([attend(head[i], read) for i, read in enumerate(reads)]) for head in q])
    return out, [len(read) for read in reads]


def core_context(q: Tensor, k: Tensor, v: Tensor, g: int, s: int) -> tuple[Tensor, list[int]]:
    cores = []
    for end in range(g, len(k) + 1, g):
        group, last = slice(end - g, end), q[:, end - 1].double().mean(0)
        cores.append((pooled(last, k[group], k[group]), pooled(last, k[group], v[group]), 0.0))
    reads = []
    for i in range(len(k)):
        seen = max(0, math.floor((i + 1 - s) / g))
        local = min(i + 1, s + (i + 1) % g)
        reads.append([*cores[:seen], *((k[j], v[j], 0.0) for j in range(i + 1 - local, i + 1))])
    return run(q, reads)


def span_of(q: Tensor, k: Tensor, v: Tensor, a: int, b: int, count: bool) -> tuple[Tensor, Tensor, float]:
    """The summary of the span a .. b - 1."""
    query = q[:, a:b].double().reshape(-1, q.shape[2]).max(0).values
    key = k[a:b].double().max(0).values
    return key, pooled(query, k[a:b], v[a:b]), math.log(b - a) if count else 0.0


def combiner_fixed(q: Tensor, k: Tensor, v: Tensor, span: int, count: bool) -> tuple[Tensor, list[int]]:
    every = [span_of(q, k, v, a, a + span, count) for a in range(0, len(k) - span + 1, span)]
    reads = []
    for i in range(len(k)):
        begin = i // span * span
        reads.append([*every[: i // span], *((k[j], v[j], 0.0) for j in range(begin, i + 1))])
    return run(q, reads)


def combiner_logsparse(
    q: Tensor, k: Tensor, v: Tensor, span: int, largest: int, count: bool
) -> tuple[Tensor, list[int]]:
    """The spans from the oldest on, each as long as is left and aligned, up to ``largest`` tokens."""
    reads, known = [], {}
    for i in range(len(k)):
        begin, a, spans = i // span * span, 0, []
        while a < begin:
            size = span
            while 2 * size <= min(largest, begin - a):
                size *= 2
            assert a % size == 0
            if (a, size) not in known:
                known[a, size] = span_of(q, k, v, a, a + size, count)
            spans.append(known[a, size])
            a += size
        reads.append([*spans, *((k[j], v[j], 0.0) for j in range(begin, i + 1))])
    return run(q, reads)


def descriptors(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, pool: int, count: bool
) -> tuple[Tensor, list[int]]:
    reads = []
    for i in range(len(k)):
        begin = i // chunk * chunk
        read = [(k[j], v[j], 0.0) for j in range(min(chunk, begin))]
        for a in range(chunk, begin, pool):
            key, value = (x[a : a + pool].double().sum(0) / pool for x in (k, v))
            read.append((key, value, math.log(pool) if count else 0.0))
        reads.append([*read, *((k[j], v[j], 0.0) for j in range(begin, i + 1))])
    return run(q, reads)


def bits_of(position: int) -> int:
    """How many spans the paper's logsparse form reads at a position: one for each bit that is set."""
    return bin(position).count("1")
