"""A2Mamba against averages of all its states, which are written down, in float64."""

from __future__ import annotations

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import A2Mamba, parse_mixer
from farspan.attention.hybrid.tokens import Tokens

from .tools import GEOMETRY, close, make, random

T = 19


@torch.no_grad()
@pytest.mark.parametrize(("window", "dilation"), [(3, 3), (2, 4), (1, 1)])
def test_the_averages_of_states(window: int, dilation: int) -> None:
    mixer, x = make(f"a2mamba:window={window},dilation={dilation}"), random(1, T, 32)
    assert isinstance(mixer, A2Mamba)
    zero = torch.zeros(1, *mixer.mamba.conv.state_shape).double()
    tokens = Tokens(x, None, None)
    scan, _, given = mixer.mamba.inputs(tokens, (zero,))  # as Mamba-2's, which test_mamba2.py tests
    q, k = ((y.unflatten(2, (4, 8)).transpose(1, 2))[0] for y in mixer.map_proj(x).chunk(2, 2))
    out = torch.zeros(1, 4, T, 8).double()
    for h in range(4):
        state, states = torch.zeros(8, 8).double(), []
        for t in range(T):
            state = scan.log_decay[0, h, t].exp() * state + torch.outer(scan.k[0, h, t], scan.v[0, h, t])
            states.append(state)
        for t in range(T):
            read = torch.zeros(8, 8).double()
            for step in (1, dilation):
                places = [t - step * i for i in range(window)]
                logits = [
                    q[h, t] @ k[h, p] / 8**0.5 if p >= 0 else torch.tensor(0.0).double() for p in places
                ]
                for share, p in zip(torch.stack(logits).softmax(0), places, strict=True):
                    read += share / 2 * states[p] if p >= 0 else 0
            out[0, h, t] = scan.q[0, h, t] @ read
    assert close(mixer(x)[0], mixer.mamba.outputs(out, tokens, given))
    if window == 1:  # every token reads its own state
        assert close(mixer(x)[0], mixer.mamba(x)[0])


def test_from_attention_and_bad_parameters() -> None:
    mixer, weight = parse_mixer("a2mamba", GEOMETRY), random(32, 32).float()
    mixer.initialise_from({"q_proj.weight": weight})
    assert torch.equal(mixer.get_parameter("mamba.q_proj.weight"), weight)
    with pytest.raises(SpecError, match="a window and a dilation of at least 1"):
        parse_mixer("a2mamba:dilation=0", GEOMETRY)
