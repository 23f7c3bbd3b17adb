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
    """x [T, 32] -> the outputs, and how many queries have attended."""
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
@pytest.mark.parametrize("whole", [False, True], ids=["running", "whole"])
def test_the_definition(factor: int, whole: bool) -> None:
    mixer, x = make(f"probsparse:factor={factor},whole={str(whole).lower()}"), random(T, 32)
    want, attended = naive(mixer, x, factor, whole)
    assert close(mixer(x[None])[0][0], want)
    assert 0 < attended < 4 * T or not whole
    mask = torch.arange(T + 4)[None] >= 4
    padded = torch.cat([torch.full((4, 32), torch.nan).double(), x])[None]
    assert close(mixer(padded, None, mask)[0][0, 4:], want)


@torch.no_grad()
def test_the_published_choice_depends_on_later_tokens() -> None:
    """Among which queries one is ranked is what differs: the outputs of the first half follow the second."""
    x = random(1, T, 32)
    changed = x.clone()
    changed[:, T // 2 :] = 3 * random(1, T - T // 2, 32, seed=1)
    for whole, same in (("false", True), ("true", False)):
        mixer = make(f"probsparse:factor=1,whole={whole}")
        before, after = (mixer(y)[0][:, : T // 2] for y in (x, changed))
        assert close(before, after) == same


def test_bad_parameters() -> None:
    with pytest.raises(SpecError, match="a factor of at least 1"):
        parse_mixer("probsparse:factor=0", GEOMETRY)
