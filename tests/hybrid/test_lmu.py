"""The Legendre memory against its recurrence in float64, and against the polynomials that it stands for."""

from __future__ import annotations

import pytest
import torch

from farspan import SpecError
from farspan.attention.hybrid import parse_mixer
from farspan.attention.hybrid.lmu import legendre

from .tools import GEOMETRY, close, make, random


@torch.no_grad()
def test_the_recurrence() -> None:
    mixer, x = make("lmu:order=5,length=9"), random(30, 32)
    w = mixer.state_dict()
    a, b = torch.zeros(5, 5).double(), torch.zeros(5).double()
    for i in range(5):
        b[i] = (2 * i + 1) * (-1) ** i / 9
        for j in range(5):
            a[i, j] = (2 * i + 1) / 9 * (-1 if i < j else (-1) ** (i - j + 1))
    held = torch.linalg.matrix_exp(a)
    into = torch.linalg.solve(a, (held - torch.eye(5).double()) @ b)
    m, outs = torch.zeros(5).double(), []
    for token in x:
        m = held @ m + into * (w["encode.weight"] @ token + w["encode.bias"]).clamp(min=0)
        h = (w["hidden.weight"] @ torch.cat([m, token]) + w["hidden.bias"]).clamp(min=0)
        outs.append(w["out_proj.weight"] @ h + w["out_proj.bias"])
    out, (end,) = mixer(x[None])
    assert close(out[0], torch.stack(outs)) and close(end[0], m)


def test_the_memory_is_the_last_values() -> None:
    """A smooth signal comes back from its coefficients: sum_i m_i P_i(2 s - 1) is what came s length ago."""
    a, b = legendre(8, 100)
    m = torch.zeros(8).double()
    signal = torch.sin(torch.arange(300) / 40.0).double()
    for u in signal:
        m = a @ m + b * u
    for ago in (10, 50, 90):
        x = torch.tensor(2 * ago / 100 - 1).double()
        polynomials = torch.stack([torch.special.legendre_polynomial_p(x, i) for i in range(8)])
        assert abs(float(m @ polynomials) - float(signal[-1 - ago])) < 0.02


def test_bad_parameters() -> None:
    with pytest.raises(SpecError, match="an order and a length of at least 1"):
        parse_mixer("lmu:order=0", GEOMETRY)
