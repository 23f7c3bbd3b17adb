"""What ``impl="auto"`` takes on CUDA: Triton where it serves the arguments better than torch does."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.kv import KV
from farspan.attention.ops.decode import decode
from farspan.attention.ops.dispatch import implementations
from farspan.attention.ops.flash import flash
from farspan.attention.softmax import Softmax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="these tests launch CUDA kernels; there is no CUDA device"
    ),
]


def test_auto() -> None:
    q, k, v = (torch.randn(1, heads, 64, 64, dtype=torch.float16, device="cuda") for heads in (4, 2, 2))
    new = q[:, :, -1:]
    with implementations() as seen:
        flash(q, KV(k, v), Softmax(0.1), window=20)
        decode(new, KV(k, v), Softmax(0.1))
    assert seen == {("flash", "triton"), ("decode", "triton")}
    with implementations() as seen:
        flash(q, KV(k, v), Softmax(0.1))  # plain causal attention is torch's
        decode(new.double(), KV(k.double(), v.double()), Softmax(0.1))  # no kernel takes float64
    assert seen == {("flash", "eager"), ("decode", "eager")}
    with implementations() as seen:
        flash(q.clone().requires_grad_(), KV(k, v), Softmax(0.1), window=20)  # no kernel has its backward
    assert seen == {("flash", "eager")}
