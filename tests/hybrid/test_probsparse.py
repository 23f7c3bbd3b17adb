"""ProbSparse against its definition in float64, query by query; the published choice sees the future."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from farspan import SpecError
from farspan.attention.hybrid import Mixer, parse_mixer

from .tools import GEOMETRY, close, make, random

T = 30


def sampled(n: int, factor: int) -> int:
    return min(n, max(1, factor * math.ceil(math.log(n))))


def naive(mixer: Mixer, x: Tensor, factor: int, whole: bool) -> tuple[Tensor, int]:
    """x [T, 32] -> the outputs, and how many queries have attended. whole: ranked among all queries, as
    published, not among the earlier ones."""
    w = mixer.state_dict()
    heads, attended = [], 0
    for h in range(4):
        kv = h // 2
        q = x @ w["q_proj.weight"][8 * h : 8 * h + 8].T
        k = x @ w["k_proj.weight"][8 * kv : 8 * kv + 8].T
        v = x @ w["v_proj.weight"][8 * kv : 8 * kv + 8].T
        measures = []
        for t in range(T):
            n = T if whole else t + 1
            scores = [
                float(q[t] @ k[i * n // sampled(n, factor)]) / 8**0.5 for i in range(sampled(n, factor))
            ]
            measures.append(max(scores) - sum(scores) / n)
        outs = []
        for t in range(T):
            rivals = measures if whole else measures[: t + 1]
            place = sorted(rivals, reverse=True).index(measures[t])
            if place < sampled(len(rivals), factor):
                attended += 1
                outs.append((k[: t + 1] @ q[t] / 8**0.5).softmax(0) @ v[: t + 1])
            else:
                outs.append(v[: t + 1].mean(0))
        heads.append(torch.stack(outs))
    return torch.cat(heads, 1) @ w["o_proj.weight"].T, attended


@torch.no_grad()
@pytest.mark.parametrize("factor", [1, 5])
def test_the_definition(factor: int) -> None:
    mixer, x = make(f"probsparse:factor={factor}"), random(T, 32)
    want, attended = naive(mixer, x, factor, whole=False)
    assert close(mixer(x[None])[0][0], want) and 0 < attended < 4 * T


@torch.no_grad()
def test_the_published_choice_depends_on_later_tokens() -> None:
    """Ranked among all queries, the outputs of the first half follow the second half; here they do not."""
    mixer, x = make("probsparse:factor=1"), random(T, 32)
    changed = torch.cat([x[: T // 2], 3 * random(T - T // 2, 32, seed=1)])
    for whole, same in ((False, True), (True, False)):
        before, after = (naive(mixer, y, 1, whole)[0][: T // 2] for y in (x, changed))
        assert close(before, after) == same
    assert close(*(mixer(y[None])[0][0, : T // 2] for y in (x, changed)))


def test_bad_parameters() -> None:
    with pytest.raises(SpecError, match="a factor of at least 1"):
        parse_mixer("probsparse:factor=0", GEOMETRY)
