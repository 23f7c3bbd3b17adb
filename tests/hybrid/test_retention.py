"""Retention against its sum over pairs of tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer

from .tools import GEOMETRY, close, make, random, rotary

T = 19


@pytest.mark.parametrize("spec,size", [("retention", 8), ("retention:expand_v=2", 16)])
@pytest.mark.parametrize("turned", [True, False], ids=["rope", "no-rope"])
@torch.no_grad()
def test_the_sum_over_pairs(spec: str, size: int, turned: bool) -> None:
    mixer, hidden = make(spec), random(T, 32)
    w = mixer.state_dict()
    angles = 0.5 ** torch.arange(4, dtype=torch.float64) * turned
    heads = []
    for h in range(4):
        shared = h // 2
        q = hidden @ w["q_proj.weight"][h * 8 : h * 8 + 8].T
        k = hidden @ w["k_proj.weight"][shared * 8 : shared * 8 + 8].T
        v = hidden @ w["v_proj.weight"][shared * size : (shared + 1) * size].T
        q, k = (torch.complex(x[:, :4], x[:, 4:]) for x in (q, k))
        z = hidden @ w["norm.gate.weight"][h * size :][:size].T + w["norm.gate.bias"][h * size :][:size]
        outs = []
        for i in range(T):
            o = torch.zeros(size, dtype=torch.float64)
            for j in range(i + 1):  # RoPE knows the distance only
                turn = torch.polar(torch.ones(4, dtype=torch.float64), (i - j) * angles)
                score = float((q[i] * turn * k[j].conj()).real.sum()) / math.sqrt(8)
                o += (1 - 2.0 ** (-5 - h)) ** (i - j) * score * v[j]
            o = o / (o.square().mean() + GEOMETRY.eps).sqrt() * w["norm.weight"][h * size :][:size]
            outs.append(o * z[i] / (1 + (-z[i]).exp()))
        heads.append(torch.stack(outs))
    want = torch.cat(heads, 1) @ w["o_proj.weight"].T
    assert close(mixer(hidden[None], None, None, rotary(T) if turned else None)[0][0], want)


def test_from_attention_and_bad_parameters() -> None:
    mixer = parse_mixer("retention", GEOMETRY)
    assert mixer.state_shapes == ((4, 8, 8),)
    mixer.initialise_from({"v_proj.weight": torch.full((16, 32), 0.5)})
    assert torch.allclose(mixer.norm.weight, torch.full((32,), 8**0.5 / 50))
    with pytest.raises(SpecError, match="retention takes an expand_v"):
        parse_mixer("retention:expand_v=0.3", GEOMETRY)
