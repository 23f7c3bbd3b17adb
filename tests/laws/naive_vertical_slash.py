"""MInference's vertical-slash pattern (2407.02490) from its definition, one head and one query block at a
time, in float64.

Nothing of the package is used here. Ties go to the lowest position and to the nearest diagonal.
"""

from __future__ import annotations

from torch import Tensor

from .naive import softmax


def columns_and_diagonals(q: Tensor, k: Tensor, count: int, scale: float) -> tuple[list[float], list[float]]:
    """q [Tq, D], the last queries of keys k [n, D] -> the attention of the last ``count`` of them, added up
    per key and per distance."""
    n = k.shape[0]
    columns, diagonals = [0.0] * n, [0.0] * n
    last = q[-count:].double()
    for i, query in enumerate(last):
        position = n - len(last) + i
        for j, p in enumerate(softmax(k[: position + 1].double() @ query * scale).tolist()):
            columns[j] += p
            diagonals[position - j] += p
    return columns, diagonals


def chosen(weight: list[float], size: int | None, mass: float | None, always: int) -> set[int]:
    """The first ``always`` and the best of the others, ``size`` together; or the first ``always`` besides the
    fewest that hold ``mass``."""
    ranking = sorted(range(len(weight)), key=lambda i: (-weight[i], i))
    forced = set(range(min(always, len(weight))))
    if mass is None:
        assert size is not None
        return set((sorted(forced) + [i for i in ranking if i not in forced])[:size])
    taken: set[int] = set()
    held, goal = 0.0, mass * sum(weight)
    for i in ranking:
        if held >= goal or weight[i] == 0:
            break
        taken.add(i)
        held += weight[i]
    return taken | forced


def blocks_read(n: int, past: int, block: int, columns: set[int], diagonals: set[int]) -> list[set[int]]:
    """[query block] the keys that it reads, later ones not left out."""
    others = [i for i in range(n) if i not in columns]
    key_blocks = [others[a : a + block] for a in range(0, len(others), block)]
    result = []
    for a in range(past, n, block):
        z = min(a + block, n)
        bands = [(a - s, z - 1 - s) for s in diagonals]  # first and last key of each
        read = set(columns)
        latest = [i for i in others if i < z][-1:]
        for keys in key_blocks:
            # Only whole blocks have a rim; what stands in the last one is nobody's but the latest queries'.
            met = len(keys) == block and any(lo <= keys[-1] and hi >= keys[0] for lo, hi in bands)
            if met or (latest and latest[0] in keys):
                read |= set(keys)
        result.append(read)
    return result


def vertical_slash(
    q: Tensor, k: Tensor, *, budgets: list[tuple[int, int]], mass: float | None, last: int, sinks: int,
    local: int, block: int, gqa_reduce: str, scale: float,
) -> list[list[set[int]]]:  # fmt: skip
    """q [G, Tq, D], the last queries of one KV head's keys k [n, D]; budgets: (columns, diagonals) of each
    head -> [query block][head] the keys it reads, later ones than its queries not left out."""
    n, group = k.shape[0], q.shape[0]
    found = [columns_and_diagonals(head, k, last, scale) for head in q]
    if gqa_reduce != "none":
        add = sum if gqa_reduce == "sum" else max
        found = [tuple([add(x) for x in zip(*kind, strict=True)] for kind in zip(*found, strict=True))]
    per_head = []
    for (columns, diagonals), (vertical, slash) in zip(found, budgets, strict=False):
        picked = chosen(columns, vertical, mass, sinks), chosen(diagonals, slash, mass, local)
        per_head.append(blocks_read(n, n - q.shape[1], block, *picked))
    per_head = per_head if gqa_reduce == "none" else per_head * group
    return [list(heads) for heads in zip(*per_head, strict=True)]


def exact_pattern(i: int, columns: set[int], diagonals: set[int]) -> set[int]:
    """The keys that the pattern gives the query at position i, before anything is made of blocks."""
    return {j for j in range(i + 1) if j in columns or i - j in diagonals}
