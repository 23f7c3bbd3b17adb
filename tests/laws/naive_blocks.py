"""Block selections written from their papers' definitions, a head and a query block at a time, in float64.

Nothing of the package is used here. q [G, Tq, D] are the queries of one KV head's group, the last Tq of the
positions of k [n, D]; what comes back is, per query block, the set of key blocks that each query head reads.
Ties go to the lowest block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import best, softmax

Blocks = list[list[set[int]]]


def own_blocks(begin: int, rows: int, block_k: int) -> set[int]:
    """The key blocks that queries at ``begin`` .. ``begin + rows - 1`` lie in."""
    return {position // block_k for position in range(begin, begin + rows)}


def together(shares: list[Tensor], gqa_reduce: str) -> list[Tensor]:
    """What each head of a group goes by: its own, or the sum or the max over heads."""
    if gqa_reduce == "none":
        return shares
    stacked = torch.stack(shares)
    return [stacked.sum(0) if gqa_reduce == "sum" else stacked.amax(0)] * len(shares)


def filled(shares: Tensor, forced: set[int], mass: float) -> set[int]:
    """``forced``, and then the largest until ``mass`` of the total is held."""
    chosen, goal, share_of = set(forced), mass * float(shares.sum()), shares.tolist()
    for j in best(shares, len(shares)):
        if sum(share_of[i] for i in sorted(chosen)) >= goal:
            break
        if share_of[j] > 0:
            chosen.add(j)
    return chosen


def antidiagonal(
    q: Tensor, k: Tensor, *, past: int, stride: int, block: int, mass: float, gqa_reduce: str, scale: float
) -> Blocks:
    """XAttention (2503.16428): S queries from a against S keys from c are judged by the sum over i of
    q[a + S - 1 - i] . k[c + i], divided by S sqrt(D); what is beyond the ends adds nothing."""
    (_, rows, _), n = q.shape, k.shape[0]
    result = []
    for a in range(0, rows, block):
        z, shares = min(a + block, rows), []
        own = own_blocks(past + a, z - a, block)
        for logits in (q[:, a:z].double() @ k.double().T).tolist():
            total = [0.0] * -(-n // block)
            for first in range(0, z - a, stride):
                starts = [c for c in range(0, n, stride) if c <= past + a + first]
                sums = []
                for c in starts:
                    pairs = [(first + stride - 1 - i, c + i) for i in range(stride)]
                    sums.append(sum(logits[r][j] for r, j in pairs if r < z - a and j < n))
                parts = softmax(torch.tensor(sums, dtype=torch.float64) * scale / stride)
                for c, part in zip(starts, parts.tolist(), strict=True):
                    total[c // block] += part
            shares.append(torch.tensor(total, dtype=torch.float64))
        result.append([filled(total, own | {0}, mass) for total in together(shares, gqa_reduce)])
    return result


def dhsa(
    q: Tensor, k: Tensor, *, past: int, block_q: int, block_k: int, local: int, k_tokens: int | None,
    fraction: float | None, gqa_reduce: str, scale: float,
) -> Blocks:  # fmt: skip
    """DHSA (2510.24606) with chunks of fixed lengths: a chunk's mean times the root of its length, products,
    and the best tokens up to the budget, which come by whole chunks. Shares over the heads of a group are
    softmax over the chunks before the local ones, of products divided by the root of both full lengths."""
    (_, rows, d), n = q.shape, k.shape[0]
    assert d == k.shape[1]
    chunks = [k[c : c + block_k].double() for c in range(0, n, block_k)]
    vectors = torch.stack([chunk.mean(0) * len(chunk) ** 0.5 for chunk in chunks])
    result = []
    for a in range(0, rows, block_q):
        z = min(a + block_q, rows)
        near = range(max(0, past + a - local + 1), past + z)
        forced = {0} | {position // block_k for position in near}
        visible, before = max(forced) + 1, near[0] // block_k
        size = k_tokens // block_k if k_tokens is not None else round((fraction or 0) * visible)
        heads = [vectors[:before] @ (x.mean(0) * len(x) ** 0.5) for x in q[:, a:z].double()]
        if gqa_reduce != "none" and before:
            weights = [softmax(products * scale / (block_q * block_k) ** 0.5) for products in heads]
            heads = together(weights, gqa_reduce)
        chosen = []
        for products in heads:
            ranked = [j for j in best(products, before) if j not in forced]
            chosen.append(forced | set(ranked[: max(0, max(size, 2 if k_tokens else 0) - len(forced))]))
        result.append(chosen)
    return result


def dhsa_vertical_slash(
    q: Tensor, k: Tensor, *, past: int, block_q: int, block_k: int, local: int, k_tokens: int | None,
    fraction: float | None, gqa_reduce: str, scale: float,
) -> Blocks:  # fmt: skip
    """DHSA's vertical-slash mask (2510.24606): the attention of the last ``block_q`` queries is summed by key
    and by distance; half the last query's tokens are columns, the rest diagonals. A key chunk scores what its
    columns hold and what the diagonals hold that pass from the queries through it. The last chunk of queries
    reads everything."""
    (_, rows, _), n = q.shape, k.shape[0]
    columns, diagonals = [], []
    for x in q.double():
        column, diagonal = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        for position in range(n - min(block_q, rows), n):
            weights = softmax(k[: position + 1].double() @ x[position - past] * scale)
            column[: position + 1] += weights
            for j in range(position + 1):
                diagonal[position - j] += weights[j]
        columns.append(column)
        diagonals.append(diagonal)
    columns, diagonals = together(columns, gqa_reduce), together(diagonals, gqa_reduce)
    tokens = k_tokens if k_tokens is not None else round((fraction or 0) * n)
    chosen_columns = [best(x, max(1, tokens // 2)) for x in columns]
    chosen_diagonals = [sorted(best(x, max(1, tokens - tokens // 2))) for x in diagonals]
    result = []
    for a in range(0, rows, block_q):
        z = min(a + block_q, rows)
        near = range(max(0, past + a - local + 1), past + z)
        forced = {0} | {position // block_k for position in near}
        if z == rows:
            forced = set(range(max(forced) + 1))
        visible = max(forced) + 1
        size = k_tokens // block_k if k_tokens is not None else round((fraction or 0) * visible)
        heads = []
        for h in range(len(q)):
            score = torch.zeros(near[0] // block_k, dtype=torch.float64)
            for j in range(len(score)):
                score[j] = sum(float(columns[h][c]) for c in chosen_columns[h] if c // block_k == j)
                for s in chosen_diagonals[h]:
                    touched = range(past + a - s, past + z - s)
                    if touched[0] < (j + 1) * block_k and touched[-1] >= j * block_k:
                        score[j] += float(diagonals[h][s])
            ranked = [j for j in best(score, len(score)) if j not in forced]
            heads.append(forced | set(ranked[: max(0, max(size, 2 if k_tokens else 0) - len(forced))]))
        result.append(heads)
    return result


def rounded(x: Tensor, levels: int) -> Tensor:
    """Rows of x [N, D] to whole multiples of 1 / levels of their largest magnitude; halves go up."""
    rows = []
    for row in x.double():
        step = float(row.abs().max()) / levels
        rows.append(torch.floor(row / step + 0.5).clamp(-levels, levels) * step if step else row)
    return torch.stack(rows)


def sale(
    q: Tensor, k: Tensor, *, past: int, tau: list[float], block_q: int, block_k: int, local: int,
    dense_below: int, q_bits: int | None, scale: float,
) -> Blocks:  # fmt: skip
    """SALE (2505.24179): m and l of each query over the first key block and those with the last ``local``
    keys of its block; another block is read if exp(s - m) / l >= tau for some pair of it, s being the logit
    with keys in four bits around their block's mean (exact) and queries in ``q_bits``."""
    (_, rows, _), n = q.shape, k.shape[0]
    blocks = [k[c : c + block_k].double() for c in range(0, n, block_k)]
    means = [keys.mean(0) for keys in blocks]
    keys4 = torch.cat([rounded(keys - mean, 7) for keys, mean in zip(blocks, means, strict=True)])
    mean_of = torch.stack([means[j // block_k] for j in range(n)])
    result: Blocks = [[] for _ in range(0, rows, block_q)]
    for head, x in enumerate(q.double()):
        exact = x @ k.double().T * scale
        low = x if q_bits is None else rounded(x, 2 ** (q_bits - 1) - 1)
        estimated = (low @ keys4.T + x @ mean_of.T) * scale
        for i, a in enumerate(range(0, rows, block_q)):
            z = min(a + block_q, rows)
            visible = set(range((past + z - 1) // block_k + 1))
            near = set(range(max(0, past + z - local) // block_k, max(visible) + 1))
            chosen = near | {0}
            if past + z <= dense_below or tau[head] <= 1e-4:
                chosen = visible
            for r in range(a, z):
                first = [j for j in range(past + r + 1) if j // block_k in near | {0}]
                m = float(exact[r, first].max())
                total = float(torch.exp(exact[r, first] - m).sum())
                score = torch.exp(estimated[r, : past + r + 1] - m) / total
                chosen = chosen | {j // block_k for j in (score >= tau[head]).nonzero()[:, 0].tolist()}
            result[i].append(chosen)
    return result
