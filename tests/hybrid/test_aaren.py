"""Aaren against the softmax over every prefix, in float64, and against the recurrence of (m, u, w)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from farspan.attention.hybrid import Geometry, parse_mixer
from farspan.attention.hybrid.aaren import Aaren

GEOMETRY = Geometry(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=4, bias=True, scale=0.7)


def made(seed: int = 0) -> Aaren:
    torch.manual_seed(seed)
    mixer = parse_mixer("aaren", GEOMETRY)
    assert isinstance(mixer, Aaren)
    return mixer.double()


def naive(mixer: Aaren, hidden: Tensor) -> tuple[Tensor, list[tuple[float, float, Tensor]]]:
    """hidden [T, hidden] -> (out [T, hidden], (m, u, w) of each head after the last token), token by
    token."""
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    d, group = 4, 3
    outs, states = [], [(-math.inf, 0.0, torch.zeros(d).double()) for _ in range(6)]
    for x in hidden:
        k = w["k_proj.weight"] @ x + w["k_proj.bias"]
        v = w["v_proj.weight"] @ x + w["v_proj.bias"]
        heads = []
        for h, (m, u, total) in enumerate(states):
            part = slice(h // group * d, (h // group + 1) * d)
            s = 0.7 * float(w["query"][h] @ k[part])
            top = max(m, s)
            u = u * math.exp(m - top) + math.exp(s - top)
            total = total * math.exp(m - top) + v[part] * math.exp(s - top)
            states[h] = top, u, total
            heads.append(total / u)
        outs.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outs), states


@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_chunks_and_their_prefix_sum_are_the_recurrence(length: int) -> None:
    mixer, x = made(), torch.randn(length, 24).double() * 3
    with torch.no_grad():
        out, (lse, mean) = mixer(x[None])
    want, states = naive(mixer, x)
    assert torch.allclose(out[0], want, atol=1e-12)
    for h, (m, u, w) in enumerate(states):
        assert float(lse[0, h]) == pytest.approx(m + math.log(u))
        assert torch.allclose(mean[0, h], w / u, atol=1e-12)


def test_each_output_is_one_softmax_over_its_prefix() -> None:
    mixer, x = made(1), torch.randn(1, 70, 24).double()
    logits, values = mixer._scored(x)
    want = torch.stack(
        [(logits[..., : t + 1].softmax(-1)[..., None] * values[:, :, : t + 1]).sum(2) for t in range(70)], 1
    )
    assert torch.allclose(mixer(x)[0], mixer.o_proj(want.flatten(2)), atol=1e-12)


def test_logits_far_apart_neither_overflow_nor_lose_gradients() -> None:
    """exp of the logits themselves would be infinite; a row's padding has the logit -inf."""
    mixer = made(2).float()
    x = (torch.randn(2, 100, 24) * 1000).requires_grad_()
    mask = torch.arange(100) >= torch.tensor([[0], [90]])
    out, state = mixer(x, None, mask)
    (out * mask[..., None]).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and bool((x.grad[1, :90] == 0).all())
    assert out.isfinite().all() and all(part.isfinite().all() for part in state)
