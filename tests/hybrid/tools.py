"""What the tests of mixers share."""

from __future__ import annotations

import torch
from torch import Tensor

from farspan.attention.hybrid import (
    EncoderMixer,
    Geometry,
    Mixer,
    mixers,
    parse_encoder_mixer,
    parse_mixer,
)
from farspan.attention.hybrid.mixer import Rotary, State

GEOMETRY = Geometry(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8)
# Mixers whose defaults are not met by 40 tokens, and parameters that run other code.
SMALL = {
    "extractor": "extractor:length=4",
    "lmu": "lmu:order=6,length=20",
    "gated_linear": "gated_linear:window=5",
    "longvq": "longvq:codes=6,window=5",
    "ponet": "ponet:segment=7",
    "probsparse": "probsparse:factor=1",
    "routing_full": "routing_full:clusters=3,w=5",
    "scout": "scout:mixer=(gated_linear:window=5),every=4",
}
MORE = (
    "gated_linear:window=6,features=plain",
    "gated_linear:window=0,expand_k=0.5",
    "gated_delta:expand_v=2,conv=3",
    "mamba2:expand=2,headdim=16,state=10",
    "retention:expand_v=2",
    "scout:mixer=none,every=3",
)
SPECS = (*(SMALL.get(name, name) for name in mixers()), *MORE)


def make(spec: str, geometry: Geometry = GEOMETRY, seed: int = 0) -> Mixer:
    """A float64 mixer none of whose parameters has the special value it begins with."""
    torch.manual_seed(seed)
    mixer = parse_mixer(spec, geometry).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return mixer


SIZE = 16  # numbers of a hidden state of encoder mixers


def make_encoder(spec: str) -> EncoderMixer:
    """A float64 encoder mixer with weights of a size at which every part of it counts."""
    torch.manual_seed(0)
    mixer = parse_encoder_mixer(spec, SIZE).double()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return mixer


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotary(tokens: int, mask: Tensor | None = None, size: int = 8) -> Rotary:
    """cos and sin of the positions 0, 1, ..., which padding does not count."""
    places = torch.arange(tokens)[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    angles = places[..., None] * 0.5 ** torch.arange(size // 2, dtype=torch.float64)
    return torch.cat([angles, angles], 2).cos(), torch.cat([angles, angles], 2).sin()


def part(x: Rotary, begin: int, end: int) -> Rotary:
    return x[0][:, begin:end], x[1][:, begin:end]


def row(mixer: Mixer, state: State, index: int) -> State:
    """The state of one row, without the room behind it that longer rows have made in parts that grow."""
    one = [x[index : index + 1] for x in state]
    for i, grows in enumerate(mixer.growing, len(mixer.state_shapes)):
        one[i] = one[i][:, : int(one[-1]) // grows.every]
    return tuple(one)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-9, atol=1e-10))


def same(mixer: Mixer, a: State, b: State) -> bool:
    rows = [zip(row(mixer, a, i), row(mixer, b, i), strict=True) for i in range(len(b[0]))]
    return len(a[0]) == len(b[0]) and all(close(x, y) for pairs in rows for x, y in pairs)


def tolerance(mixer: Mixer) -> float:
    """How far half precision may be from float64, as a share of the output. Where rounding changes choices
    it moves some outputs far, and most of them hardly."""
    return 0.3 if mixer.discrete else 0.03


def equal(a: State, b: State) -> bool:
    return all(map(torch.equal, a, b))


def convolved(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x [T, channels], one token and one tap after another."""
    width, out = weight.shape[1], torch.zeros_like(x)
    for t in range(len(x)):
        for tap in range(width):
            if t - tap >= 0:
                out[t] += weight[:, width - 1 - tap] * x[t - tap]
        out[t] += 0 if bias is None else bias
    return out * out.sigmoid()
