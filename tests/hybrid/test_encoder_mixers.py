"""Each encoder mixer against its definition in float64; Hydra's is in test_hydra.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from farspan import FarspanError

from .tools import SIZE, close, make_encoder, random

T = 13


def weights(spec: str) -> tuple[torch.nn.Module, dict[str, Tensor], Tensor]:
    mixer = make_encoder(spec)
    return mixer, {name: p.detach() for name, p in mixer.named_parameters()}, random(T, SIZE)


def dft(n: int, m: int) -> Tensor:
    """exp(-2 pi i a b / n) of a < m, b < n."""
    angles = -2 * math.pi * torch.outer(torch.arange(m), torch.arange(n)).double() / n
    return torch.complex(angles.cos(), angles.sin())


@torch.no_grad()
def test_fnet_is_two_transforms() -> None:
    for scaled in (True, False):
        mixer, _, x = weights(f"fnet:scaled={str(scaled).lower()}")
        want = (dft(T, T) @ x.cdouble() @ dft(SIZE, SIZE)).real / (math.sqrt(T * SIZE) if scaled else 1)
        assert close(mixer(x[None])[0], want)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 12, 13])
def test_aff_is_a_filter_that_its_frequencies_choose(length: int) -> None:
    mixer, w, _ = weights("aff:blocks=4")
    x = random(length, SIZE)
    found = dft(length, length) @ x.cdouble() / math.sqrt(length)
    filtered = torch.zeros_like(found)
    for f in range(length // 2 + 1):
        chosen = []
        for block in range(4):
            y = found[f, 4 * block : 4 * block + 4]
            for layer in range(2):
                y = y @ torch.complex(*w["weight"][layer, :, block]) + torch.complex(
                    *w["bias"][layer, :, block]
                )
                if layer == 0:
                    y = torch.complex(y.real.clamp(min=0), y.imag.clamp(min=0))
            parts = [p.sign() * (p.abs() - 0.01).clamp(min=0) for p in (y.real, y.imag)]
            chosen.append(torch.complex(*parts))
        filtered[f] = found[f] * torch.cat(chosen)
        if f == 0 or 2 * f == length:
            filtered[f] = filtered[f].real.cdouble()  # of a real signal
        else:
            filtered[length - f] = filtered[f].conj()
    want = (dft(length, length).conj().T @ filtered).real / math.sqrt(length) + x
    assert close(mixer(x[None])[0], want)


@torch.no_grad()
@pytest.mark.parametrize("landmarks", [5, 40])
def test_soft_is_a_kernel_by_landmarks(landmarks: int) -> None:
    """With as many landmarks as tokens it is the kernel of all pairs."""
    mixer, w, x = weights(f"soft:heads=2,landmarks={landmarks}")
    x, heads = x / 4, []
    for h in range(2):
        rows = slice(8 * h, 8 * h + 8)
        q, v = (x @ w[f"{n}_proj.weight"][rows].T + w[f"{n}_proj.bias"][rows] for n in ("qk", "v"))
        n = min(landmarks, T)
        parts = [(i * T // n, -(-(i + 1) * T // n)) for i in range(n)]
        means = torch.stack([q[a:b].mean(0) for a, b in parts])

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return (-torch.cdist(a, b).square() / 2).exp()

        c = kernel(q, means)
        heads.append(c @ torch.linalg.pinv(kernel(means, means), hermitian=True) @ c.T @ v)
        if n == T:
            assert torch.allclose(heads[-1], kernel(q, q) @ v, atol=1e-6)
    want = torch.cat(heads, 1) @ w["o_proj.weight"].T + w["o_proj.bias"]
    assert torch.allclose(mixer(x[None])[0], want, atol=1e-3)


@torch.no_grad()
def test_channel_attention_is_of_cosines() -> None:
    mixer, w, x = weights("channel_attention:heads=2")
    q, k, v = (x @ w["qkv_proj.weight"].T).chunk(3, 1)
    heads = []
    for h in range(2):
        out = torch.zeros(T, 8).double()
        for i in range(8):
            of_q = q[:, 8 * h + i]
            cosines = [
                of_q @ k[:, 8 * h + j] / of_q.norm() / k[:, 8 * h + j].norm() * w["tau"][h] for j in range(8)
            ]
            for j, share in enumerate(torch.stack(cosines).softmax(0)):
                out[:, i] += share * v[:, 8 * h + j]
        heads.append(out)
    assert close(mixer(x[None])[0], torch.cat(heads, 1) @ w["o_proj.weight"].T + w["o_proj.bias"])


@torch.no_grad()
def test_tsmixer_is_a_matrix_of_positions_and_a_network() -> None:
    mixer, w, x = weights("tsmixer:length=20")
    u = torch.zeros_like(x)
    for t in range(T):
        for s in range(T):
            u[t] += w["over_tokens.weight"][t, s] * x[s]
        u[t] += w["over_tokens.bias"][t]
    u = u.clamp(min=0)
    inside = ((x + u) @ w["over_channels.0.weight"].T + w["over_channels.0.bias"]).clamp(min=0)
    assert close(mixer(x[None])[0], u + inside @ w["over_channels.2.weight"].T + w["over_channels.2.bias"])
    with pytest.raises(FarspanError, match="weights for 20 tokens; this call has 21"):
        mixer(random(1, 21, SIZE))


@torch.no_grad()
@pytest.mark.parametrize("segment", [1, 5, 32])
def test_ponet_pools(segment: int) -> None:
    mixer, w, x = weights(f"ponet_encoder:segment={segment}")
    q, k, s, local, o = (x @ w["in_proj.weight"].T + w["in_proj.bias"]).chunk(5, 1)
    g = (k @ q.mean(0) / 4).softmax(0) @ k
    outs = []
    for t in range(T):
        begin = t // segment * segment
        y = (g + s[begin : begin + segment].amax(0)) * o[t] + local[max(0, t - 1) : t + 2].amax(0)
        outs.append(w["out_proj.weight"] @ y + w["out_proj.bias"])
    assert close(mixer(x[None])[0], torch.stack(outs))
