"""Mamba-2 against its recurrence, one token and one head after another in float64."""

from __future__ import annotations

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer
from farspan.attention.hybrid.short_convolution import ShortConvolution

from .tools import GEOMETRY, close, convolved, make, random

T = 19


@pytest.mark.parametrize(
    "spec,heads,size,state,x_heads,groups",
    [("mamba2", 4, 8, 8, 2, 4), ("mamba2:expand=2,headdim=16,state=10,conv=3", 4, 16, 10, 4, 1)],
    ids=["attention", "published"],
)
@torch.no_grad()
def test_the_recurrence(spec: str, heads: int, size: int, state: int, x_heads: int, groups: int) -> None:
    mixer, hidden = make(spec), random(T, 32)
    w = mixer.state_dict()
    columns = [hidden @ w[f"{n}_proj.weight"].T for n in "vkq"]
    channels = [y.shape[1] for y in columns]
    y = convolved(w["conv.weight"], w["conv.bias"], torch.cat(columns, 1))
    xs, bs, cs = y.split(channels, 1)
    delta = (1 + (hidden @ w["decay.proj.weight"].T + w["decay.dt_bias"]).exp()).log()
    a = -w["decay.A_log"].exp()
    ys = torch.zeros(T, heads * size, dtype=torch.float64)
    for h in range(heads):
        i, j, c_head = h * x_heads // heads, h * bs.shape[1] // state // heads, h * groups // heads
        s = torch.zeros(size, state, dtype=torch.float64)
        for t in range(T):
            x = xs[t, i * size : (i + 1) * size]
            b, c = bs[t, j * state : (j + 1) * state], cs[t, c_head * state : (c_head + 1) * state]
            s = (delta[t, h] * a[h]).exp() * s + delta[t, h] * torch.outer(x, b)
            ys[t, h * size : (h + 1) * size] = s @ c + w["D"][h] * x
    z = hidden @ w["norm.gate.weight"].T + w["norm.gate.bias"]
    gated = (ys * z * z.sigmoid()).view(T, groups, -1)
    normed = gated / (gated.square().mean(2, keepdim=True) + GEOMETRY.eps).sqrt()
    want = (normed.view(T, -1) * w["norm.weight"]) @ w["o_proj.weight"].T
    got, _ = mixer(hidden[None])
    assert close(got[0], want)


def test_begins_as_published() -> None:
    torch.manual_seed(0)
    mixer = parse_mixer("mamba2:expand=32,headdim=4", GEOMETRY)
    delta = torch.nn.functional.softplus(mixer.decay.dt_bias)
    assert 0.0009 < delta.min() < 0.002 and 0.05 < delta.max() < 0.11
    a = mixer.decay.A_log.exp()
    assert 1 <= a.min() < 1.5 and 15 < a.max() <= 16.001 and bool((mixer.D == 1).all())
    assert mixer.state_shapes == ((256, 128, 4), (3, 1024 + 256))


@torch.no_grad()
def test_from_attention_it_begins_without_gates() -> None:
    mixer = parse_mixer("mamba2", GEOMETRY).double()
    mixer.initialise_from({"v_proj.weight": torch.full((16, 32), 0.5), "q_proj.weight": torch.ones(32, 32)})
    x = random(1, T, 64)
    assert close(mixer.conv(x, torch.zeros(1, 3, 64), None)[0], x * x.sigmoid())
    gates = torch.nn.functional.silu(mixer.norm.gate(random(1, T, 32)))
    assert torch.allclose(gates, torch.ones_like(gates)) and bool((mixer.q_proj.weight == 1).all())
    published = parse_mixer("mamba2:expand=1,headdim=8,state=32", GEOMETRY)
    published.initialise_from({"o_proj.weight": torch.ones(32, 32)})
    assert not bool((published.o_proj.weight == 1).any())


def test_a_convolution_of_one_tap_has_no_state() -> None:
    conv = ShortConvolution(6, 1, bias=False).double()
    x = random(2, 5, 6)
    y, after = conv(x, torch.zeros(2, 0, 6), None)
    assert close(y[0], convolved(conv.weight, None, x[0])) and after.shape == (2, 0, 6)


def test_bad_parameters() -> None:
    for spec in ("expand=-1", "headdim=0", "expand=2,headdim=48", "expand=0.001", "conv=0"):
        with pytest.raises(SpecError, match="mamba2 takes headdim, state and conv"):
            parse_mixer(f"mamba2:{spec}", GEOMETRY)
