"""SCOUT against its definition in float64: one softmax over the checkpoints before a query and the query."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan import SpecError
from farspan.attention.hybrid import Geometry, Scout, parse_mixer

GEOMETRY = Geometry(hidden_size=24, num_heads=6, num_kv_heads=2, head_dim=4)


def made(spec: str, seed: int = 0) -> Scout:
    torch.manual_seed(seed)
    mixer = parse_mixer(spec, GEOMETRY).double()
    assert isinstance(mixer, Scout)
    return mixer


def attention(mixer: Scout, x: Tensor, every: int) -> Tensor:
    """Checkpoint attention of the mixed stream x [T, hidden] without RoPE, query by query."""
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    outs = []
    for t in range(len(x)):
        read = [*range(every - 1, t, every), t]
        heads = []
        for h in range(6):
            rows, kv = slice(4 * h, 4 * h + 4), slice(4 * (h // 3), 4 * (h // 3) + 4)
            q = w["q_proj.weight"][rows] @ x[t]
            logits = torch.stack([q @ (w["k_proj.weight"][kv] @ x[j]) / 2 for j in read])
            values = torch.stack([w["v_proj.weight"][kv] @ x[j] for j in read])
            heads.append(logits.softmax(0) @ values)
        outs.append(w["o_proj.weight"] @ torch.cat(heads))
    return torch.stack(outs)


@torch.no_grad()
def test_the_block_with_a_mixer() -> None:
    mixer, x = made("scout:mixer=aaren,every=4"), torch.randn(30, 24).double() * 2
    assert mixer.mixer is not None
    m = mixer.mixer(x[None])[0][0]
    stream = x + m
    normed = stream / (stream.square().mean(1, keepdim=True) + 1e-5).sqrt()
    out, (*_, keys, values, tokens) = mixer(x[None])
    assert torch.allclose(out[0], m + attention(mixer, normed, 4), atol=1e-12)
    assert keys.shape == values.shape == (1, 7, 2, 4) and tokens.tolist() == [30]
    want = (normed @ mixer.k_proj.weight.T)[3::4].unflatten(1, (2, 4))
    assert torch.allclose(keys[0], want, atol=1e-12)


@torch.no_grad()
def test_checkpoint_attention_alone() -> None:
    mixer, x = made("scout:mixer=none"), torch.randn(45, 24).double() * 2
    out, state = mixer(x[None])
    assert torch.allclose(out[0], attention(mixer, x, 10), atol=1e-12)
    assert len(state) == 3
    first, state = mixer(x[None, :19])  # the last token is a checkpoint
    second, _ = mixer(x[None, 19:], state)
    assert torch.allclose(torch.cat([first, second], 1), out, atol=1e-12)


@torch.no_grad()
def test_padding_does_not_shift_checkpoints() -> None:
    mixer, x = made("scout:mixer=aaren"), torch.randn(2, 43, 24).double()
    mask = torch.arange(43) >= torch.tensor([[0], [6]])
    out, (*_, keys, _, tokens) = mixer(x, None, mask)
    alone, (*_, own, _, _) = mixer(x[1:, 6:])
    assert torch.allclose(out[1, 6:], alone[0], atol=1e-12)
    assert torch.allclose(keys[1, :3], own[0], atol=1e-12) and tokens.tolist() == [43, 37]


def test_keys_are_a_tenth_and_gradients_reach_every_weight() -> None:
    mixer = made("scout:mixer=aaren").float()
    assert mixer.state_bytes_after(109) == 6 * 5 * 4 + 8 + 10 * 2 * 2 * 4 * 4
    mixer(torch.randn(1, 25, 24))[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in mixer.parameters())


def test_bad_parameters() -> None:
    for spec, says in (
        ("scout:every=0,mixer=none", "at least 1 token per checkpoint; got 0"),
        ("scout:mixer=(sigmoid:length=9)", "the state of sigmoid:length=9 grows"),
        ("scout:mixer=aren", "no mixer 'aren'"),
    ):
        with pytest.raises(SpecError, match=says):
            parse_mixer(spec, GEOMETRY)
