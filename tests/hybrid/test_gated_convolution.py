"""The gated long convolution against a double loop in float64, and the three laws of mixers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan import SpecError
from farspan.attention.hybrid import Geometry, parse_mixer

GEOMETRY = Geometry(hidden_size=12, num_heads=2, num_kv_heads=1, head_dim=6)
T = 37


@pytest.fixture(params=[1, 5, 64])
def mixer(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    made = parse_mixer(f"base_conv:length={request.param}", GEOMETRY).double()
    torch.nn.init.normal_(made.bias)
    return made


def loop(mixer: torch.nn.Module, u: Tensor) -> Tensor:
    """The definition: u [T, hidden] -> [T, hidden], each output a sum over the tokens before it."""
    w = {name: p.detach() for name, p in mixer.named_parameters()}
    outs = []
    for t in range(len(u)):
        mixed = w["bias"].clone()
        for j in range(min(mixer.length, t + 1)):
            mixed += w["filter"][:, j] * u[t - j]
        outs.append(mixed * (w["gate_proj.weight"] @ u[t] + w["gate_proj.bias"]) + u[t])
    return torch.stack(outs)


def inputs(rows: int) -> Tensor:
    return torch.randn(rows, T, 12, generator=torch.Generator().manual_seed(1)).double()


def test_whole_split_and_steps_are_the_loop(mixer: torch.nn.Module) -> None:
    u = inputs(2)
    want = torch.stack([loop(mixer, row) for row in u])
    whole, end = mixer(u)
    assert torch.allclose(whole, want, atol=1e-12)
    first, state = mixer(u[:, :14])
    second, state = mixer(u[:, 14:], state)
    assert torch.allclose(torch.cat([first, second], 1), want, atol=1e-12)
    assert torch.allclose(state[0], end[0], atol=1e-12)
    state, outs = mixer.initial_state(2, u.device), []
    for t in range(T):
        out, state = mixer.step(u[:, t], state)
        outs.append(out)
    assert torch.allclose(torch.stack(outs, 1), want, atol=1e-12)
    assert torch.allclose(state[0], end[0], atol=1e-12)
    assert tuple(state[0].shape[1:]) == mixer.state_shapes[0]


def test_padding_changes_nothing_also_in_a_continued_call(mixer: torch.nn.Module) -> None:
    before, u = inputs(3)[:, :9], inputs(3)
    mask = torch.ones(3, T, dtype=torch.bool)
    mask[1, :20] = mask[2, 31:] = False
    u[~mask] = 1e3
    for state in (None, mixer(before)[1]):
        out, (end,) = mixer(u, state, mask)
        for row, (a, b) in enumerate([(0, T), (20, T), (0, 31)]):
            its = None if state is None else (state[0][row : row + 1],)
            alone, (s,) = mixer(u[row : row + 1, a:b], its)
            assert torch.allclose(out[row, a:b], alone[0], atol=1e-11)
            assert torch.allclose(end[row], s[0], atol=1e-11)


def test_gradients_are_those_of_the_loop(mixer: torch.nn.Module) -> None:
    assert torch.autograd.gradcheck(lambda u: mixer(u)[0], inputs(1)[:, :8].requires_grad_(), fast_mode=True)


def test_half_precision_is_near_and_a_length_of_0_is_refused(mixer: torch.nn.Module) -> None:
    u = inputs(1)
    want = mixer(u)[0]
    low, state = mixer.bfloat16()(u.bfloat16())
    assert low.dtype == state[0].dtype == torch.bfloat16
    assert (low.double() - want).abs().max() <= 0.05 * want.abs().max()
    with pytest.raises(SpecError, match="at least 1 token; got length=0"):
        parse_mixer("base_conv:length=0", GEOMETRY)
