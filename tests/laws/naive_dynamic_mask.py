"""Dynamic Mask Attention written from its paper, a query at a time.

Nothing of the package is used here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def biases(v: Tensor, a: Tensor, w: Tensor, form: str) -> Tensor:
    """A . softplus(V W), or its exponential: v [Hkv, N, D] of one row, w [Hkv, D, Hkv] -> [Hkv, N]. The
    values of all heads are one vector of a token."""
    flat = v.transpose(0, 1).reshape(v.shape[1], -1)  # [N, Hkv * D]
    weight = w.reshape(-1, w.shape[2])
    columns = []
    for head in range(len(a)):
        dt = flat @ weight[:, head]
        columns.append(a[head] * torch.log1p(torch.exp(dt)))
    bias = torch.stack(columns)
    return torch.exp(bias) if form == "exp" else bias


def read(bias: list[float], t: int, *, w: int, local: int) -> set[int]:
    """What the query at position t reads: the last ``local`` keys, and of the others the largest biases up to
    w keys in all, of equal ones the later."""
    near = {j for j in range(t + 1) if t - j < local}
    others = sorted((j for j in range(t + 1) if j not in near), key=lambda j: (bias[j], j), reverse=True)
    return near | set(others[: w - len(near)])


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keys: set[int], scale: float
) -> tuple[Tensor, Tensor]:
    """One query q [D] over ``keys`` of k, v [N, D], bias [N] added to the logits -> (out, lse)."""
    at = sorted(keys)
    logits = scale * (k[at] @ q) + bias[at]
    lse = torch.logsumexp(logits, 0)
    return torch.exp(logits - lse) @ v[at], lse


def loss(q: Tensor, k: Tensor, bias: Tensor, *, scale: float, local: int) -> Tensor:
    """For one row, q [H, T, D], k [Hkv, T, D], bias [Hkv, T]: how far softmax(bias) is from the mean
    attention of the heads of a group, beyond the last ``local`` keys of each query; weighted with the
    attention there."""
    group, apart, mass = len(q) // len(k), [], 0.0
    for head in range(len(k)):
        for t in range(q.shape[1]):
            far = range(t + 1 - local)
            if not far:
                continue
            shares = [
                torch.softmax(scale * (k[head, : t + 1] @ q[head * group + g, t]), 0) for g in range(group)
            ]
            target = torch.stack(shares).mean(0)[: len(far)]
            there = float(target.sum())
            gate = torch.log_softmax(bias[head, : len(far)], 0)
            kl = sum(float(p) / there * (math.log(float(p) / there) - gate[j]) for j, p in enumerate(target))
            apart.append(there * kl)
            mass += there
    return torch.stack(apart).sum() / mass
