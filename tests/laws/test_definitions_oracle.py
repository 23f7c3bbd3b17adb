"""The oracle against its definition, on random queries and keys and on those of SmolLM2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.sparse.oracle import Oracle

from . import naive_blocks as naive
from .test_definitions_blocks import CUTS, Definition, assert_as_defined, random_and_peaked
from .tools import Data

SETTINGS: list[dict[str, Any]] = [
    {"mass": 0.6, "block": 8},
    {"mass": 0.9, "k": 24, "block": 8, "gqa_reduce": "sum"},
    {"mass": 1.0, "fraction": 0.3, "block": 16, "gqa_reduce": "max"},
]


def shares_of(q: Tensor, k: Tensor, past: int, block: int) -> list[Tensor]:
    """Per query block of queries q [n, D], the attention it pays each key block."""
    result = []
    for a in range(0, len(q), block):
        total = [0.0] * -(-len(k) // block)
        for r in range(a, min(a + block, len(q))):
            weights = torch.softmax(k[: past + r + 1].double() @ q[r].double() * k.shape[1] ** -0.5, 0)
            for j, weight in enumerate(weights.tolist()):
                total[j // block] += weight
        result.append(torch.tensor(total, dtype=torch.float64))
    return result


def oracle(method: Oracle) -> Definition:
    block = method.block

    def blocks(q: Tensor, k: Tensor, past: int, _: int) -> naive.Blocks:
        heads = [shares_of(head, k, past, block) for head in q]
        result = []
        for n, shares in enumerate(zip(*heads, strict=True)):
            begin = past + n * block
            own = naive.own_blocks(begin, min(block, past + q.shape[1] - begin), block)
            visible = max(own) + 1
            most = min(round((method.fraction or 1) * visible), -(-(method.k or len(k)) // block))
            chosen = []
            for total in naive.together(list(shares), method.gqa_reduce):
                enough = naive.filled(total[:visible], own, method.mass)
                rest = [j for j in naive.best(total, visible) if j in enough - own]
                chosen.append(own | set(rest[: max(0, most - len(own))]))
            result.append(chosen)
        return result

    return blocks


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
@random_and_peaked
def test_oracle(
    settings: dict[str, Any], cuts: list[int], starts: list[int] | None, make: Callable[..., Data]
) -> None:
    method = Oracle(**settings)
    assert_as_defined(method, make(150, starts), cuts, oracle(method))


def test_oracle_on_smollm2(smollm2_layers: list[Data]) -> None:
    method = Oracle(block=32)
    for data in smollm2_layers:
        [gqa_reduce] = assert_as_defined(method, data, [512], oracle(method))
        assert gqa_reduce < 0.9
