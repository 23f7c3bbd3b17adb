"""RWKV-4 against its two sums over pairs of tokens in float64, and its spiking form against a loop."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from farspan.attention.hybrid import Mixer

from .tools import close, make, random, same

T = 40


def naive(mixer: Mixer, x: Tensor) -> Tensor:
    """x [T, 32] -> [T, 32]."""
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    k, v, r = (torch.empty_like(x) for _ in range(3))
    for t in range(len(x)):
        before = x[t - 1] if t else torch.zeros_like(x[0])
        for i, (to, name) in enumerate(((k, "key"), (v, "value"), (r, "receptance"))):
            to[t] = w[f"{name}.weight"] @ (w["mix"][i] * x[t] + (1 - w["mix"][i]) * before)
    outs = []
    for t in range(len(x)):
        own = (w["bonus"] + k[t]).exp()
        above, below = own * v[t], own
        for i in range(t):
            weight = (k[i] - (t - 1 - i) * w["decay"].exp()).exp()
            above, below = above + weight * v[i], below + weight
        outs.append(w["output.weight"] @ (above / below / (1 + (-r[t]).exp())))
    return torch.stack(outs)


@torch.no_grad()
def test_the_sums_over_pairs() -> None:
    mixer, x = make("rwkv4"), random(T, 32)
    assert close(mixer(x[None])[0][0], naive(mixer, x))
    keys = x.clone()
    keys[3] *= 1e3  # a key whose exponential overflows
    assert bool(mixer(keys[None])[0].isfinite().all())


@torch.no_grad()
def test_spikes_are_those_of_the_loop_in_segments_steps_and_under_padding() -> None:
    mixer, x = make("rwkv4:spiking=true"), random(T, 32) * 4
    potential, want = torch.zeros(32).double(), []
    for current in naive(mixer, x):
        h = potential / 2 + current / 2
        want.append((h >= 1).double())
        potential = torch.where(h >= 1, 0, h)
    whole, end = mixer(x[None])
    assert torch.equal(whole[0], torch.stack(want)) and 0.02 < float(whole.mean()) < 0.5
    assert close(end[3][0], potential)
    state, outs = None, []
    for a, b in itertools.pairwise((0, 1, 2, 30, T)):
        out, state = mixer(x[None, a:b], state)
        outs.append(out)
    assert torch.equal(torch.cat(outs, 1), whole) and same(mixer, state, end)
    mask = torch.arange(T + 5)[None] >= 5
    out, padded = mixer(torch.cat([torch.full((5, 32), torch.nan), x])[None].double(), None, mask)
    assert torch.equal(out[:, 5:], whole) and same(mixer, padded, end)


def test_gradients_pass_the_spikes() -> None:
    mixer, x = make("rwkv4:spiking=true"), (random(1, T, 32) * 4).requires_grad_()
    mixer(x)[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in (x, *mixer.parameters()))
    assert mixer.halo is None
