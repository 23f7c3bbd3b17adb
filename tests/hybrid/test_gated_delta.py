"""Gated DeltaNet against its recurrence, one token and one head after another in float64."""

from __future__ import annotations

import math

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer

from .tools import GEOMETRY, close, convolved, make, random, rotary

T = 19


@pytest.mark.parametrize("spec,size", [("gated_delta", 8), ("gated_delta:expand_v=2,conv=3", 16)])
@torch.no_grad()
def test_the_recurrence(spec: str, size: int) -> None:
    mixer, hidden = make(spec), random(T, 32)
    w = mixer.state_dict()
    columns = [hidden @ w[f"{n}_proj.weight"].T for n in "qkv"]
    joined = convolved(w["conv.weight"], None, torch.cat(columns, 1))
    qs, ks, vs = joined.split([y.shape[1] for y in columns], 1)
    heads = []
    for h in range(4):
        shared = h // 2
        k, q = ks[:, shared * 8 : shared * 8 + 8], qs[:, h * 8 : h * 8 + 8]
        v = vs[:, shared * size : (shared + 1) * size]
        beta = 1 / (1 + (-hidden @ w["beta_proj.weight"][shared]).exp())
        delta = (1 + (hidden @ w["decay.proj.weight"][shared] + w["decay.dt_bias"][shared]).exp()).log()
        alpha = (-w["decay.A_log"][shared].exp() * delta).exp()
        z = hidden @ w["norm.gate.weight"][h * size :][:size].T + w["norm.gate.bias"][h * size :][:size]
        s, outs = torch.zeros(8, size, dtype=torch.float64), []
        for t in range(T):
            key, query = k[t] / k[t].norm(), q[t] / q[t].norm()
            # The paper's form: what the state says of the key fades, and the value takes its place.
            s = alpha[t] * (s - beta[t] * torch.outer(key, key @ s)) + beta[t] * torch.outer(key, v[t])
            o = query @ s / math.sqrt(8)
            o = o / (o.square().mean() + GEOMETRY.eps).sqrt() * w["norm.weight"][h * size :][:size]
            outs.append(o * z[t] / (1 + (-z[t]).exp()))
        heads.append(torch.stack(outs))
    want = torch.cat(heads, 1) @ w["o_proj.weight"].T
    assert close(mixer(hidden[None], None, None, rotary(T))[0][0], want)


@torch.no_grad()
def test_a_key_that_comes_again_replaces_its_value() -> None:
    """With β = 1 and no decay the state is a dictionary: the last value of a key."""
    mixer = parse_mixer("gated_delta", GEOMETRY).double()
    mixer.decay.dt_bias.fill_(-50)
    x, tokens = random(2, 32), [0, 1, 0]
    mixer.beta_proj.weight.copy_(1000 * torch.linalg.pinv(x).sum(1).expand(2, -1))
    mixer.conv.pass_through()
    _, (state, _) = mixer(x[tokens][None])
    k = torch.nn.functional.silu(x @ mixer.k_proj.weight.T)[:, :8]
    v = torch.nn.functional.silu(x @ mixer.v_proj.weight.T)[:, :8]
    assert torch.allclose((k[0] / k[0].norm()) @ state[0, 0], v[0])


def test_from_attention_and_bad_parameters() -> None:
    mixer = parse_mixer("gated_delta", GEOMETRY)
    mixer.initialise_from({"v_proj.weight": torch.full((16, 32), 0.5)})
    assert torch.allclose(mixer.norm.weight, torch.full((32,), 8**0.5 / 50))
    assert bool((mixer.conv.weight[:, -1] == 1).all()) and not mixer.conv.weight[:, :-1].any()
    for spec in ("expand_v=0.3", "conv=0", "expand_v=0"):
        with pytest.raises(SpecError, match="gated_delta takes conv >= 1"):
            parse_mixer(f"gated_delta:{spec}", GEOMETRY)
