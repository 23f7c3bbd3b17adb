"""The extractor against its sum over distances in float64."""

from __future__ import annotations

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer

from .tools import GEOMETRY, close, make, random


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 4, 30])
def test_the_sum_over_distances(length: int) -> None:
    mixer, x = make(f"extractor:length={length}"), random(19, 32)
    w = mixer.state_dict()
    outs = []
    for t in range(19):
        mixed = torch.zeros(32).double()
        for j in range(min(length, t + 1)):
            mixed += x[t - j] @ w["extract"][j]
        adjusted = mixed * (w["adjust.weight"] @ x[t] + w["adjust.bias"])
        outs.append(w["out_proj.weight"] @ adjusted + w["out_proj.bias"])
    assert close(mixer(x[None])[0][0], torch.stack(outs))


def test_bad_parameters() -> None:
    with pytest.raises(SpecError, match="a length of at least 1 token"):
        parse_mixer("extractor:length=0", GEOMETRY)
