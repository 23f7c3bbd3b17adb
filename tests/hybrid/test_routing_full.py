"""Trained routing against its definition in float64, query by query, and the loss of its centroids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan import SpecError
from farspan.attention.hybrid import RoutingFull, parse_mixer

from .tools import GEOMETRY, close, make, random

T = 30


def vectors(mixer: RoutingFull, x: Tensor, head: int) -> Tensor:
    y = x @ mixer.qk_proj.weight[8 * head : 8 * head + 8].T
    y = y - y.mean(1, keepdim=True)
    return y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("w", [1, 5, 64])
def test_the_definition(w: int) -> None:
    mixer, x = make(f"routing_full:clusters=3,w={w}"), random(T, 32)
    assert isinstance(mixer, RoutingFull)
    heads, others = [], 0
    for h in range(4):
        k, v = vectors(mixer, x, h), x @ mixer.v_proj.weight[8 * h : 8 * h + 8].T
        outs = []
        for t in range(T):
            mu = max(mixer.centroids[h], key=lambda c: float(k[t] @ c))
            best = sorted(range(t), key=lambda j: float(k[j] @ mu), reverse=True)[: w - 1]
            others += len(best) > 0 and max(best) < t - 1
            read = [t, *best]
            outs.append((k[read] @ k[t] / 8**0.5).softmax(0) @ v[read])
        heads.append(torch.stack(outs))
    assert close(mixer(x[None])[0][0], torch.cat(heads, 1) @ mixer.o_proj.weight.T)
    assert others > 0 or w != 5  # it is no window


def test_the_loss_draws_centroids_and_tokens_together() -> None:
    mixer, x = make("routing_full:clusters=3,w=5,commitment=0.5"), random(2, T, 32)
    assert isinstance(mixer, RoutingFull)
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, :10] = False
    loss = torch.zeros(()).double()
    for h in range(4):
        for token in x[mask]:
            unit = vectors(mixer, token[None], h)[0]
            unit = unit / unit.norm()
            mu = max(mixer.centroids[h], key=lambda c: float((unit @ c).detach()))
            loss = loss + 0.5 * (unit - mu).square().sum() / (4 * int(mask.sum()))
    want = torch.autograd.grad(loss, (mixer.centroids, mixer.qk_proj.weight))
    (mixer(x, None, mask)[0] * 0).sum().backward()
    assert all(map(close, (mixer.centroids.grad, mixer.qk_proj.weight.grad), want))
    mixer.zero_grad()
    mixer.eval()(x)[0].sum().backward()
    assert mixer.centroids.grad is None


def test_bad_parameters() -> None:
    with pytest.raises(SpecError, match="clusters and w of at least 1"):
        parse_mixer("routing_full:w=0", GEOMETRY)
