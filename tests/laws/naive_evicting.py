"""SnapKV and H2O written from their papers for one row and one KV head, in float64, as Python sets and lists.

Nothing of the package is used here. Queries are those of the KV head's group; ties go to the lowest position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import best


def paid(queries: Tensor, keys: Tensor, scale: float, read: list[int] | None = None) -> dict[int, float]:
    """What one position's queries [G, D] pay, summed over the group, to each of the keys they read."""
    places = list(range(len(keys))) if read is None else sorted(read)
    logits = queries.double() @ keys[places].double().T * scale
    return dict(zip(places, torch.softmax(logits, -1).sum(0).tolist(), strict=True))


class SnapKVRow:
    """SnapKV (2404.14469): what is left of the prompt, and everything since."""

    def __init__(self, k: int, window: int, kernel: int, pool: str, scale: float) -> None:
        self.k, self.window, self.kernel, self.pool, self.scale = k, window, kernel, pool, scale
        self.kept: set[int] | None = None
        self.end = 0

    def prefilled(self, queries: Tensor, keys: Tensor, observed: int) -> None:
        """queries [G, n, D] and keys [n, D] of the whole sequence, whose last ``observed`` queries are those
        of the prompt."""
        n = len(keys)
        self.end = n
        if n <= self.k:
            self.kept = set(range(n))
            return
        votes = torch.zeros(n - self.window, dtype=torch.float64)
        for i in range(max(0, n - min(self.window, observed)), n):
            for j, weight in paid(queries[:, i], keys[: i + 1], self.scale).items():
                if j < n - self.window:
                    votes[j] += weight
        half = self.kernel // 2
        around = [votes[max(0, j - half) : j + half + 1] for j in range(len(votes))]
        pooled = torch.stack([x.sum() / self.kernel if self.pool == "avg" else x.max() for x in around])
        self.kept = {*best(pooled, self.k - self.window), *range(n - self.window, n)}

    def cropped(self) -> None:
        self.kept = None

    def step(self, queries: Tensor, keys: Tensor) -> set[int]:
        """What the newest position reads."""
        n = len(keys)
        if self.kept is None:
            self.prefilled(queries, keys, 1)
            return set(range(n))
        return self.kept | set(range(self.end, n))


class H2ORow:
    """H2O (2306.14048): scores are all the attention a key has ever been paid."""

    def __init__(self, k: int, scale: float) -> None:
        self.heavy, self.recent, self.scale = k // 2, k - k // 2, scale
        self.scores: list[float] | None = None
        self.hitters: list[int] = []

    def prefilled(self, queries: Tensor, keys: Tensor, begin: int) -> None:
        """queries [G, n, D] and keys [n, D] of the whole sequence; those from ``begin`` on are new and read
        everything."""
        n = len(keys)
        self.scores = (self.scores or [])[:begin]
        self.scores += [0.0] * (n - len(self.scores))
        for i in range(begin, n):
            self._add(paid(queries[:, i], keys[: i + 1], self.scale))
        old = torch.tensor(self.scores[: max(0, n - self.recent)], dtype=torch.float64)
        self.hitters = best(old, self.heavy)

    def cropped(self) -> None:
        self.scores = None

    def step(self, queries: Tensor, keys: Tensor) -> set[int]:
        n = len(keys)
        if self.scores is None:
            self.prefilled(queries, keys, n - 1)
            return set(range(n))
        self.scores.append(0.0)
        if n > self.recent:  # one leaves the recent keys, and is a heavy hitter or goes
            candidates = sorted([*self.hitters, n - 1 - self.recent])
            worth = torch.tensor([self.scores[i] for i in candidates], dtype=torch.float64)
            self.hitters = [candidates[i] for i in best(worth, self.heavy)]
        read = {*self.hitters, *range(max(0, n - self.recent), n)}
        self._add(paid(queries[:, n - 1], keys, self.scale, sorted(read)))
        return read

    def _add(self, weights: dict[int, float]) -> None:
        assert self.scores is not None
        for i, weight in weights.items():
            self.scores[i] += weight
