"""Gated linear attention against its definitions, one pair of tokens after another in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from farspan import SpecError
from farspan.attention.hybrid import Geometry, parse_mixer, window
from farspan.attention.hybrid.window import window_attention

from .tools import GEOMETRY, close, make, random, rotary

T, D, GROUP = 23, 8, 2


def heads(w: dict[str, Tensor], name: str, x: Tensor, head: int, size: int) -> Tensor:
    return x @ w[f"{name}_proj.weight"][head * size : (head + 1) * size].T


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x [T, D] as D / 2 complex numbers, each turned by its angle."""
    z = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], 1)


def phi(w: dict[str, Tensor], name: str, head: int, x: Tensor) -> Tensor:
    key = f"{name}_features.weight"
    if key not in w:
        return x.softmax(-1)
    y = x @ w[key][head]
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


@pytest.mark.parametrize("features", ["learned", "plain"])
@torch.no_grad()
def test_window_and_rest_share_one_normaliser(features: str) -> None:
    window = 5
    mixer = make(f"gated_linear:window={window},features={features}")
    w, x = mixer.state_dict(), random(T, 32)
    angles = torch.arange(T)[:, None] * 0.5 ** torch.arange(D // 2, dtype=torch.float64)
    outs = []
    for head in range(4):
        shared = head // GROUP
        q = turned(heads(w, "q", x, head, D), angles)
        k = turned(heads(w, "k", x, shared, D), angles)
        v = heads(w, "v", x, shared, D)
        gate = x @ w["gate_proj.weight"][shared] + w["gate_proj.bias"][shared]
        g = -torch.log(1 + (-gate).exp()) / 16
        out = torch.zeros(T, D, dtype=torch.float64)
        for i in range(T):
            near = range(max(0, i - window + 1), i + 1)
            score = {j: float(q[i] @ k[j]) / math.sqrt(D) for j in near}
            total = sum(map(math.exp, score.values()))
            weight = {j: math.exp(s) / total for j, s in score.items()}
            for j in range(i - window + 1):  # token j has left the window since token j + window
                decay = math.exp(float(g[j + window + 1 : i + 1].sum()))
                feature = float(phi(w, "q", head, q[i]) @ phi(w, "k", shared, k[j]))
                weight[j] = math.exp(float(w["log_share"][head])) * decay * feature
            out[i] = sum(a * v[j] for j, a in weight.items()) / sum(weight.values())
        outs.append(out)
    want = torch.cat(outs, 1) @ w["o_proj.weight"].T
    got, _ = mixer(x[None], None, None, rotary(T))
    assert close(got[0], want)


@torch.no_grad()
def test_without_a_window_it_is_the_published_one() -> None:
    mixer = make("gated_linear:window=0,expand_k=0.5")
    w, x, size = mixer.state_dict(), random(T, 32), 4
    outs = []
    for head in range(4):
        shared = head // GROUP
        q, k = heads(w, "q", x, head, size), heads(w, "k", x, shared, size)
        v = heads(w, "v", x, shared, D)
        part = slice(shared * size, (shared + 1) * size)
        low = x @ w["gate_proj.0.weight"].T @ w["gate_proj.1.weight"][part].T + w["gate_proj.1.bias"][part]
        alpha = low.sigmoid() ** (1 / 16)
        gate = x @ w["norm.gate.weight"][head * D :][:D].T + w["norm.gate.bias"][head * D :][:D]
        state = torch.zeros(size, D, dtype=torch.float64)
        for i in range(T):
            state = alpha[i][:, None] * state + torch.outer(k[i], v[i])
            o = q[i] @ state / math.sqrt(size)
            o = o / (o.square().mean() + GEOMETRY.eps).sqrt() * w["norm.weight"][head * D :][:D]
            outs.append(o * gate[i] * gate[i].sigmoid())
    want = torch.stack(outs).view(4, T, D).transpose(0, 1).reshape(T, 32) @ w["o_proj.weight"].T
    got, _ = mixer(x[None], None, None, rotary(T))
    assert close(got[0], want)


@torch.no_grad()
def test_within_the_window_it_is_the_attention() -> None:
    """A converted layer equals the attention that it replaces on up to ``window`` tokens."""
    mixer, x = make("gated_linear:window=30"), random(1, 30, 32)
    w, (cos, sin) = mixer.state_dict(), rotary(30)
    q, k, v = (x @ w[f"{n}_proj.weight"].T for n in "qkv")
    q, k, v = (y.unflatten(2, (-1, D)).transpose(1, 2) for y in (q, k, v))
    q, k = (y * cos + torch.cat([-y[..., 4:], y[..., :4]], 3) * sin for y in (q, k))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert close(mixer(x, None, None, rotary(30))[0], y.transpose(1, 2).flatten(2) @ w["o_proj.weight"].T)


@torch.no_grad()
def test_a_wide_window_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random(2, 4, 23, 8), random(2, 2, 28, 8, seed=1), random(2, 2, 28, 6, seed=2)
    valid = torch.tensor([2, 5])
    whole = window_attention(q, k, v, scale=0.3, valid=valid).out
    monkeypatch.setattr(window, "_SCORES", 2 * 4 * 5 * 10 * 2)  # two of the five blocks
    assert close(window_attention(q, k, v, scale=0.3, valid=valid).out, whole)


def test_from_attention_and_bad_parameters() -> None:
    mixer = parse_mixer("gated_linear:window=0", GEOMETRY)
    mixer.initialise_from({"v_proj.weight": torch.full((16, 32), 0.5)})
    assert torch.allclose(mixer.norm.weight, torch.full((32,), 8**0.5 / 50))
    y, x = random(1, 4, 3, 8).float(), random(1, 3, 32).float()
    assert torch.allclose(mixer.norm(y, x).square().mean(2), torch.tensor(8 / 2500), rtol=1e-3)
    for spec in ("window=-1", "features=other", "expand_k=0.3"):
        with pytest.raises(SpecError, match="gated_linear takes window >= 0"):
            parse_mixer(f"gated_linear:{spec}", GEOMETRY)
    with pytest.raises(SpecError, match="RoPE over 16 numbers does not fit"):
        parse_mixer("gated_linear", GEOMETRY)(random(1, 3, 32).float(), rotary=rotary(3, size=16))
    wide = Geometry(hidden_size=32, num_heads=4, num_kv_heads=4, head_dim=8, scale=0.5)
    assert parse_mixer("gated_linear", wide).state_shapes[0] == (4, 8, 9)
