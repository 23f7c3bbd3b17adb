"""MambaMixer against its two state spaces, the channels of each token read piece by piece in float64."""

from __future__ import annotations

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import MambaMixer, parse_mixer

from .tools import GEOMETRY, close, make, random


@torch.no_grad()
def test_channels_are_read_forth_and_back() -> None:
    mixer, x = make("mambamixer:group=8,state=5"), random(1, 6, 32)
    assert isinstance(mixer, MambaMixer)
    y = mixer.tokens(x)[0]
    a = mixer.shares
    want = torch.zeros(1, 6, 32).double()
    for t in range(6):
        c = (a[0] * x + a[1] * y)[:, t]
        z = torch.zeros(1, 4, 8).double()
        for module, order in ((mixer.forth, range(4)), (mixer.back, range(3, -1, -1))):
            state = module.initial_state(1, x.device)
            for piece in order:
                out, state = module.step(c[:, 8 * piece : 8 * piece + 8], state)
                z[:, piece] += out
        want[:, t] = a[2] * y[:, t] + a[3] * z.flatten(1)
    assert close(mixer(x)[0], want)


def test_from_attention_and_bad_parameters() -> None:
    mixer, weight = parse_mixer("mambamixer", GEOMETRY), random(32, 32).float()
    mixer.initialise_from({"q_proj.weight": weight})
    assert torch.equal(mixer.get_parameter("tokens.q_proj.weight"), weight)
    with pytest.raises(SpecError, match="a group that divides hidden_size 32; got 5"):
        parse_mixer("mambamixer:group=5", GEOMETRY)
