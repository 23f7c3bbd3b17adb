"""select against the definition."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.ops.select import top_k

IMPLS = ["reference", "eager"]


def _brute_top_k(row: list[float], k: int, order: str) -> list[int]:
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return ranked if order == "score" else sorted(ranked)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("levels", [2, 5, None])
@pytest.mark.parametrize("k", [1, 7, 62, 63, 100])
def test_top_k_gives_ties_to_the_lowest_position(impl: str, order: str, levels: int | None, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, 63, generator=generator)
    if levels is not None:
        x = (x * levels).floor()
    x[0, 0, 10:40] = -torch.inf  # not to be had
    x[1, 1, 30:33] = torch.inf  # forced
    got = top_k(x, k, order=order, impl=impl)
    assert got.shape == (3, 2, min(k, 63)) and got.dtype == torch.int64
    for a in range(3):
        for b in range(2):
            assert got[a, b].tolist() == _brute_top_k(x[a, b].tolist(), min(k, 63), order)


def test_top_k_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="k of at least 1; got 0"):
        top_k(torch.zeros(3), 0)
    with pytest.raises(ValueError, match="'position' or 'score'; got 'size'"):
        top_k(torch.zeros(3), 1, order="size")
