"""SeerAttention and SeerAttention-R written from their papers, a row and a head at a time, in float64.

Nothing of the package is used here. Queries and keys are those before RoPE; theta is the base of the layer's
RoPE. Ties go to the lowest block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .naive import best, combined, softmax


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """RoPE of one vector x [d]: its numbers i and d / 2 + i turn by position * theta^(-2 i / d)."""
    half = len(x) // 2
    angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second, cos, sin = x[:half], x[half:], angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def pooled_key(k: Tensor, j: int, block: int) -> Tensor:
    """concat(max, min, mean) [3 D] of block j of keys [T, D]."""
    keys = k[j * block : (j + 1) * block].double()
    return torch.cat([keys.max(0).values, keys.min(0).values, keys.mean(0)])


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return x / torch.sqrt((x * x).mean() + 1e-6) * weight


def gate_logits(
    q: Tensor, k: Tensor, n: int, wq: Tensor | None, wk: Tensor, block: int, theta: float
) -> Tensor:
    """SeerAttention's logits of query block n for key blocks 0 .. n, of one head: its queries q [rows, D]
    that the call has, keys k [T, D], wq [D, d_g] or None, wk [3 D, d_g]."""
    mean = q.double().mean(0)
    query = turned(mean if wq is None else mean @ wq, n * block, theta)
    found = []
    for j in range(n + 1):
        key = turned(pooled_key(k, j, block) @ wk, j * block, theta)
        found.append(query @ key / math.sqrt(len(key)))
    return torch.stack(found)


def chosen(
    shares: Tensor, forced: set[int], most: int, mass: float | None, threshold: float | None
) -> set[int]:
    """The blocks read, of shares [n + 1] of the visible ones: those forced, then the best others within all
    budgets."""
    if threshold:
        most = min(most, len(forced | {j for j, x in enumerate(shares.tolist()) if x >= threshold}))
    rest, read = [j for j in best(shares, len(shares)) if j not in forced], set(forced)
    goal = (mass or 1) * float(shares.sum())
    for j in rest:
        enough = mass is not None and mass < 1 and float(shares[list(read)].sum()) >= goal
        if len(read) >= most or enough:
            break
        read.add(j)
    return read


def seer(
    q: Tensor,
    k: Tensor,
    past: int,
    wq: list[Tensor] | None,
    wk: list[Tensor],
    theta: float,
    *,
    block: int,
    k_tokens: int | None,
    fraction: float | None,
    mass: float | None,
    threshold: float | None,
    gqa_reduce: str,
) -> list[list[set[int]]]:
    """[query block][query head of the group]: the key blocks read. q [G, n, D] are the call's queries of a
    group, the first at position ``past`` of its row; k [T, D] all keys; wk one for each query head."""
    length, result = past + q.shape[1], []
    for n in range(past // block, -(-length // block)):
        rows = slice(max(0, n * block - past), (n + 1) * block - past)
        logits = torch.stack(
            [
                gate_logits(head[rows], k, n, None if wq is None else wq[g], wk[g], block, theta)
                for g, head in enumerate(q)
            ]
        )
        if gqa_reduce == "none":
            shares = [softmax(row) for row in logits]
        else:
            one = combined(logits, gqa_reduce)
            shares = [one / (len(q) if gqa_reduce == "sum" else 1)] * len(q)
        most = n + 1 if fraction is None else round(fraction * (n + 1))
        most = max(2, most if k_tokens is None else min(most, k_tokens // block))
        result.append([chosen(row, {0, n}, most, mass, threshold) for row in shares])
    return result


def decode_logits(
    q: Tensor, k: Tensor, position: int, w: dict[str, Tensor], block: int, theta: float
) -> list[Tensor]:
    """SeerAttention-R's logits of one position for the blocks before its own: its queries q [G, D] of one KV
    head, all keys k [T, D]. With w = {q [G D, d_g], k [3 D, d_g], q_norm, k_norm [d_g]} one row for the
    group; with w = {q [G, D, d_g], k [3 D, d_g]} one for each query head."""
    if "q_norm" in w:
        queries = [normalised(q.double().flatten() @ w["q"], w["q_norm"])]
    else:
        queries = [head.double() @ w["q"][g] for g, head in enumerate(q)]
    found = []
    for query in queries:
        row = []
        for j in range(position // block):
            key = pooled_key(k, j, block) @ w["k"]
            key = turned(normalised(key, w["k_norm"]) if "k_norm" in w else key, j * block, theta)
            row.append(turned(query, position, theta) @ key / math.sqrt(len(key)))
        found.append(torch.stack(row))
    return found


def seer_decode(
    q: Tensor,
    k: Tensor,
    w: dict[str, Tensor],
    theta: float,
    *,
    block: int,
    k_tokens: int | None,
    threshold: float | None,
) -> set[int]:
    """The keys that the last of the keys' positions reads: its queries q [G, D], all keys k [T, D]; w: the
    gate of one KV head, as in ``decode_logits``."""
    position = len(k) - 1
    if k_tokens is not None and len(k) <= k_tokens and not threshold:
        return set(range(len(k)))
    own = position // block
    of_heads = [softmax(logits) for logits in decode_logits(q, k, position, w, block, theta)]
    shares = torch.cat([sum(of_heads) / len(of_heads), torch.zeros(1, dtype=torch.float64)])
    most = own + 1 if k_tokens is None or len(k) <= k_tokens else max(2, k_tokens // block)
    blocks = chosen(shares, {0, own}, most, None, threshold)
    return {t for j in blocks for t in range(j * block, (j + 1) * block) if t <= position}


def probabilities(q: Tensor, k: Tensor, position: int) -> Tensor:
    """Softmax attention of one query q [D] at a position over keys k [T, D], over all T keys: 0 for later
    ones."""
    logits = k.double() @ q.double() * q.shape[0] ** -0.5
    return torch.softmax(logits.masked_fill(torch.arange(len(k)) > position, -torch.inf), 0)


def divergence(logits: Tensor, truth: Tensor, left_out: set[int]) -> Tensor:
    """KL(truth || softmax(logits)) of one row over all its blocks, plus the same without ``left_out``."""
    total = torch.zeros((), dtype=torch.float64)
    for keep in (range(len(truth)), [j for j in range(len(truth)) if j not in left_out]):
        picked = list(keep)
        p = truth[picked] / truth[picked].sum()
        total = total + (p * (p.log() - torch.log_softmax(logits[picked], 0))).sum()
    return total


def seer_loss(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, theta: float, block: int) -> Tensor:
    """The loss of SeerAttention's gate on one window: q [H, T, D], k [Hkv, T, D], wq [H, D, d_g],
    wk [Hkv, 3 D, d_g]. A differentiable scalar."""
    group, length = len(q) // len(k), q.shape[1]
    count, rows = -(-length // block), []
    for h, head in enumerate(q):
        keys = k[h // group]
        for n in range(max(2, count // 4), count):
            within = range(n * block, min((n + 1) * block, length))
            weights = torch.stack([probabilities(head[t], keys, t) for t in within])
            largest = torch.stack([part.max() for part in weights.split(block, 1)][: n + 1])
            logits = gate_logits(
                head[n * block : (n + 1) * block], keys, n, wq[h], wk[h // group], block, theta
            )
            rows.append(divergence(logits, largest / largest.sum(), {0, n}))
    return torch.stack(rows).mean()


def seer_decode_loss(
    q: Tensor, k: Tensor, w: dict[str, Tensor], theta: float, block: int, every: int
) -> Tensor:
    """The loss of SeerAttention-R's gate on one window, of one of ``every`` queries of its second half;
    tensors as in ``seer_loss``, the gate's w those of all heads. A gate of a group has the largest
    probability over the group's heads for its truth."""
    length, rows = q.shape[1], []
    for s, keys in enumerate(k):
        group = slice(s * len(q) // len(k), (s + 1) * len(q) // len(k))
        one = {name: x[s] if name in ("q", "k") else x for name, x in w.items()}
        if "q_norm" not in w:
            one["q"] = w["q"][group]
        for t in range(max(length // 2, 2 * block), length, every):
            own = t // block
            of_heads = torch.stack([probabilities(head[t], keys, t) for head in q[group]])
            truths = of_heads.max(0).values[None] if "q_norm" in w else of_heads
            for truth, logits in zip(
                truths, decode_logits(q[group, t], keys, t, one, block, theta), strict=True
            ):
                largest = torch.stack([part.max() for part in truth.split(block)][:own])
                rows.append(divergence(logits, largest / largest.sum(), {0}))
    return torch.stack(rows).mean()
