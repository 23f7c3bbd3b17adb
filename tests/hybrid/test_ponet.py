"""Causal PoNet against its sums and maxima, token by token in float64."""

from __future__ import annotations

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer

from .tools import GEOMETRY, close, make, random


@torch.no_grad()
@pytest.mark.parametrize("segment", [1, 7, 32])
def test_the_pools(segment: int) -> None:
    mixer, x = make(f"ponet:segment={segment}"), random(40, 32)
    w = mixer.state_dict()
    q, k, s, local, o = (x @ w["in_proj.weight"].T + w["in_proj.bias"]).chunk(5, 1)
    outs, scores = [], []
    for t in range(40):
        scores.append(q[: t + 1].mean(0) @ k[t] / 32**0.5)
        g = torch.stack(scores).softmax(0) @ k[: t + 1]
        begin = t // segment * segment
        y = (g + s[begin : t + 1].amax(0)) * o[t] + local[max(0, t - 2) : t + 1].amax(0)
        outs.append(w["out_proj.weight"] @ y + w["out_proj.bias"])
    assert close(mixer(x[None])[0][0], torch.stack(outs))


def test_bad_parameters() -> None:
    with pytest.raises(SpecError, match="segments of at least 1 token"):
        parse_mixer("ponet:segment=0", GEOMETRY)
