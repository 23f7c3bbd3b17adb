"""The gated CNN against a loop over tokens and taps in float64."""

from __future__ import annotations

import math

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer

from .tools import GEOMETRY, close, make, random


@torch.no_grad()
@pytest.mark.parametrize(("spec", "width"), [("gated_conv", 85), ("gated_conv:expand=1,conv=2", 32)])
def test_the_loop(spec: str, width: int) -> None:
    mixer, x = make(spec), random(19, 32)
    w = mixer.state_dict()
    projected = x @ w["in_proj.weight"].T + w["in_proj.bias"]
    outs = []
    for t in range(19):
        g, i, _ = projected[t].split([width, width - 32, 32])
        c = w["conv.bias"].clone()
        for lag in range(min(t + 1, mixer.conv.weight.shape[1])):
            c += w["conv.weight"][:, -1 - lag] * projected[t - lag, 2 * width - 32 :]
        gelu = g * (1 + torch.erf(g / math.sqrt(2))) / 2
        outs.append(w["out_proj.weight"] @ (gelu * torch.cat([i, c])) + w["out_proj.bias"])
    assert close(mixer(x[None])[0][0], torch.stack(outs))


def test_bad_parameters() -> None:
    for spec in ("gated_conv:conv=0", "gated_conv:expand=0.5", "gated_conv:expand=nan"):
        with pytest.raises(SpecError, match="conv and expand of at least 1"):
            parse_mixer(spec, GEOMETRY)
