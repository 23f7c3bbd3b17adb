"""LongVQ against one softmax over its window and the codes of all earlier keys in float64."""

from __future__ import annotations

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer
from farspan.attention.hybrid.moving_average import moving_average

from .tools import GEOMETRY, close, make, random

T = 30


@torch.no_grad()
@pytest.mark.parametrize(("codes", "window"), [(6, 5), (1, 1), (6, 64)])
def test_the_softmax_over_window_and_codes(codes: int, window: int) -> None:
    mixer, x = make(f"longvq:codes={codes},window={window}"), random(T, 32)
    w = mixer.state_dict()
    keep = 1 / (1 + (-w["decay"]).exp())
    smooth, y = [], torch.zeros(32).double()
    for token in x:
        y = keep * y + (1 - keep) * token
        smooth.append(y)
    heads = []
    for h in range(4):
        kv = h // 2
        q = x @ w["q_proj.weight"][8 * h : 8 * h + 8].T
        k = torch.stack(smooth) @ w["k_proj.weight"][8 * kv : 8 * kv + 8].T
        v = x @ w["v_proj.weight"][8 * kv : 8 * kv + 8].T
        coded = torch.stack(
            [min(w["codebook"][kv], key=lambda c: float((c - key).square().sum())) for key in k]
        )
        outs = []
        for t in range(T):
            begin = max(0, t - window + 1)
            read = torch.cat([coded[:begin], k[begin : t + 1]])
            outs.append((read @ q[t] / 8**0.5).softmax(0) @ v[: t + 1])
        heads.append(torch.stack(outs))
    z = x @ w["gate.weight"].T + w["gate.bias"]
    want = (torch.cat(heads, 1) * z * z.sigmoid()) @ w["o_proj.weight"].T
    assert close(mixer(x[None])[0][0], want)


def test_from_attention_it_has_no_average_and_no_gate() -> None:
    mixer = parse_mixer("longvq", GEOMETRY).double()
    mixer.initialise_from({})
    x = random(1, 9, 32)
    smooth = moving_average(x, torch.zeros(1, 32).double(), mixer.decay.sigmoid())
    assert torch.allclose(smooth, x, atol=0.01)
    assert bool((torch.nn.functional.silu(mixer.gate(x)) - 1).abs().max() < 1e-6)
    with pytest.raises(SpecError, match="codes and a window of at least 1"):
        parse_mixer("longvq:codes=0", GEOMETRY)
