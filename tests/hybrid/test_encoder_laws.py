"""The laws that every registered encoder mixer obeys."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from farspan import SpecError
from farspan.attention.hybrid import (
    EncoderMixer,
    Geometry,
    encoder_mixers,
    mixers,
    parse_encoder_mixer,
    parse_mixer,
)

from .tools import SIZE, close, make_encoder, random

T = 21
SMALL = {
    "hydra": "hydra:head_dim=8,state=5",
    "ponet_encoder": "ponet_encoder:segment=6",
    "soft": "soft:heads=2,landmarks=5",
    "tsmixer": "tsmixer:length=30",
}
SPECS = [*(SMALL.get(name, name) for name in encoder_mixers()), "channel_attention:heads=2", "aff:blocks=2"]


@pytest.fixture(params=SPECS)
def mixer(request: pytest.FixtureRequest) -> EncoderMixer:
    return make_encoder(request.param)


@pytest.fixture
def mask() -> Tensor:
    """Padding left, right, on both sides, and everywhere."""
    mask = torch.ones(5, T, dtype=torch.bool)
    mask[1, :13] = mask[2, 20:] = mask[3, :2] = mask[3, 7:] = mask[4] = False
    return mask


@torch.no_grad()
def test_rows_with_padding_are_the_rows_alone(mixer: EncoderMixer, mask: Tensor) -> None:
    x = random(5, T, SIZE)
    x[~mask] = torch.nan
    out = mixer(x, mask)
    for row in range(4):
        assert close(out[row, mask[row]], mixer(x[row : row + 1, mask[row]])[0]), row
    every = random(3, T, SIZE)
    assert close(mixer(every, torch.ones(3, T, dtype=torch.bool)), mixer(every))


@torch.no_grad()
def test_it_reads_later_tokens(mixer: EncoderMixer) -> None:
    x = random(1, T, SIZE)
    before = mixer(x)
    x[:, -1] = random(1, SIZE, seed=1) * 3
    after = mixer(x)
    segment = 6 if mixer.name == "ponet_encoder" else T  # its global average moves all others
    assert not torch.allclose(before[:, T - segment], after[:, T - segment])
    assert not torch.allclose(before[:, 0], after[:, 0])


def test_gradients_reach_every_parameter_and_no_padding(mixer: EncoderMixer, mask: Tensor) -> None:
    x = random(5, T, SIZE).requires_grad_()
    mixer(x, mask)[mask].square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()) and bool(p.grad.abs().sum() > 0), name
    assert x.grad is not None and bool(x.grad.isfinite().all()) and not x.grad[~mask].any()
    assert bool(x.grad[0, 0].any())


@torch.no_grad()
def test_half_precision_and_autocast(mixer: EncoderMixer, mask: Tensor) -> None:
    mixer = mixer.bfloat16()
    x = random(5, T, SIZE).bfloat16()
    got = mixer(x, mask)
    mixer = mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(x.float(), mask)
    want = mixer.double()(x.double(), mask)
    assert got.dtype == torch.bfloat16
    for out in (got, mixed):
        assert (out[mask] - want[mask]).norm() <= 0.04 * want[mask].norm()


def test_causal_models_are_refused_in_one_sentence() -> None:
    geometry = Geometry(hidden_size=SIZE, num_heads=2, num_kv_heads=2, head_dim=8)
    found = encoder_mixers().keys()
    assert {"hydra", "fnet", "aff", "soft", "channel_attention", "tsmixer", "ponet_encoder"} <= found
    assert not found & mixers().keys()
    for name in found:
        with pytest.raises(
            SpecError, match=f"{name} reads later tokens, so it cannot stand in a causal LM"
        ) as e:
            parse_mixer(name, geometry)
        assert len(re.findall(r"[.!?] [A-Z]", str(e.value))) == 0


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("fnets", "no encoder mixer 'fnets'"),
        ("fnet:nothing=1", "has no parameter 'nothing'"),
        ("aff:blocks=3", "blocks that divide hidden_size 16; got 3"),
        ("soft:heads=3", "heads that divide hidden_size 16"),
        ("soft:landmarks=0", "landmarks of at least 1"),
        ("channel_attention:heads=0", "heads that divide hidden_size 16; got 0"),
        ("tsmixer:length=0", "a length of at least 1 token"),
        ("ponet_encoder:segment=0", "segments of at least 1 token"),
        ("hydra:conv=4", "an odd conv"),
        (None, "A mixer is a string"),
    ],
)
def test_bad_input(spec: str, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        parse_encoder_mixer(spec, SIZE)
