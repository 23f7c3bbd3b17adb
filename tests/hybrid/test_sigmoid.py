"""Sigmoid attention against its sum in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from farspan import SpecError
from farspan.attention.hybrid import Geometry, Sigmoid, parse_mixer
from farspan.attention.hybrid.sigmoid import sigmoid_sum

PLAIN = Geometry(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=4)
NORMED = Geometry(
    hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=4, bias=True, out_bias=True, qk_norm=True, scale=0.3
)


def angles(length: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, 4] of positions from ``first`` on."""
    at = torch.arange(first, first + length).double()[:, None] * torch.tensor([1.0, 0.1]).double()
    at = torch.cat([at, at], 1)[None]
    return at.cos(), at.sin()


def naive(mixer: Sigmoid, hidden: Tensor, geometry: Geometry, length: int, turned: bool) -> Tensor:
    """hidden [T, hidden] -> [T, hidden], one query, head and key after the other."""
    w = {name: p.detach() for name, p in mixer.named_parameters()}

    def head(name: str, x: Tensor, h: int, position: int) -> Tensor:
        y = w[f"{name}_proj.weight"][4 * h : 4 * h + 4] @ x
        if geometry.bias:
            y = y + w[f"{name}_proj.bias"][4 * h : 4 * h + 4]
        if geometry.qk_norm and name != "v":
            y = y / (y.square().mean() + geometry.eps).sqrt() * w[f"{name}_norm.weight"]
        if turned and name != "v":
            a, b, c, d = (float(one) for one in y)
            p, r = position, 0.1 * position
            y = torch.tensor(
                [
                    a * math.cos(p) - c * math.sin(p),
                    b * math.cos(r) - d * math.sin(r),
                    c * math.cos(p) + a * math.sin(p),
                    d * math.cos(r) + b * math.sin(r),
                ],
                dtype=torch.float64,
            )
        return y

    scale = 0.5 if geometry.scale is None else geometry.scale
    outs = []
    for t in range(len(hidden)):
        heads = []
        for h in range(6):
            q, total = head("q", hidden[t], h, t), torch.zeros(4).double()
            for j in range(t + 1):
                logit = scale * float(q @ head("k", hidden[j], h // 3, j)) - math.log(length)
                total += head("v", hidden[j], h // 3, j) / (1 + math.exp(-logit))
            heads.append(total)
        out = w["o_proj.weight"] @ torch.cat(heads)
        outs.append(out + w["o_proj.bias"] if geometry.out_bias else out)
    return torch.stack(outs)


@pytest.mark.parametrize("geometry", [PLAIN, NORMED], ids=["plain", "normed"])
@pytest.mark.parametrize("turned", [False, True], ids=["no-rope", "rope"])
def test_the_sum(geometry: Geometry, turned: bool) -> None:
    torch.manual_seed(0)
    mixer = parse_mixer("sigmoid:length=32", geometry).double()
    assert isinstance(mixer, Sigmoid)
    x = torch.randn(20, 24).double()
    out, (keys, values, tokens) = mixer(x[None], rotary=angles(20) if turned else None)
    assert torch.allclose(out[0], naive(mixer, x, geometry, 32, turned), atol=1e-12)
    assert keys.shape == values.shape == (1, 20, 2, 4) and tokens.tolist() == [20]


def test_a_norm_of_the_output() -> None:
    torch.manual_seed(0)
    mixer, plain = parse_mixer("sigmoid:norm=true", PLAIN).double(), parse_mixer("sigmoid", PLAIN).double()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    x = torch.randn(1, 9, 24).double()
    y = plain(x)[0]
    assert torch.allclose(mixer(x)[0], y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt(), atol=1e-12)


def test_sums_over_disjoint_keys_add() -> None:
    q, k, v = (torch.randn(1, 2, 7, 4).double() for _ in range(3))
    keep = torch.ones(7, 7, dtype=torch.bool).tril()[None]
    whole, a, b = (
        sigmoid_sum(q, k[:, :, part], v[:, :, part], keep[..., part], scale=0.5, bias=-1.0)
        for part in (slice(None), slice(3), slice(3, None))
    )
    assert torch.allclose(whole, a + b, atol=1e-12)


def test_state_bytes_are_those_of_the_keys_and_values() -> None:
    mixer = parse_mixer("sigmoid", PLAIN).bfloat16()
    assert mixer.state_bytes_after(100) == 100 * 2 * 2 * 4 * 2 + 8
    _, state = mixer(torch.randn(1, 100, 24).bfloat16())
    assert sum(x.nbytes for x in state) == mixer.state_bytes_after(100)


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(SpecError, match="at least 1 token; got 0"):
        parse_mixer("sigmoid:length=0", PLAIN)
