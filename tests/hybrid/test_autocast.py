"""Under autocast projections are in half precision; logits, weights and states are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.hybrid import Geometry, parse_mixer
from farspan.attention.hybrid.aaren import logits
from farspan.attention.hybrid.prefix_softmax import chunks
from farspan.attention.hybrid.sigmoid import sigmoid_sum
from farspan.attention.hybrid.window import window_attention
from farspan.attention.ops import scan as ops

from .tools import SPECS, random, rotary, tolerance


def some(*shape: int) -> Tensor:
    return random(*shape).float()


Q, K, V = some(1, 4, 20, 8), some(1, 2, 20, 8), some(1, 4, 20, 6)
FUNCTIONS: dict[str, Callable[[], Any]] = {
    "scan": lambda: ops.scan(Q, Q, V, -V[..., 0].abs()),
    "scan_step": lambda: ops.scan_step(q=Q[:, :, 0], k=Q[:, :, 0], v=V[:, :, 0], state=some(1, 4, 8, 6)),
    "window": lambda: window_attention(
        Q, some(1, 2, 25, 8), some(1, 2, 25, 8), scale=1, valid=torch.tensor([3])
    ),
    "sigmoid": lambda: (sigmoid_sum(Q, K, K, scale=1, bias=-3),),
    "logits": lambda: (logits(Q[0, :2, :3], K),),
    "chunks": lambda: chunks(V[..., 0], V, None),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_stays_float32(name: str) -> None:
    want = FUNCTIONS[name]()
    with torch.autocast("cpu", torch.bfloat16):
        got = FUNCTIONS[name]()
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_mixer_is_near_itself_without_autocast(spec: str) -> None:
    """Also with norms of queries and keys, which return float32 where values are in half precision."""
    torch.manual_seed(0)
    geometry = Geometry(hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True)
    mixer, x = parse_mixer(spec, geometry), some(2, 20, 32)
    cos, sin = (z.float() for z in rotary(20))
    want, want_state = mixer(x, None, None, (cos, sin))
    with torch.autocast("cpu", torch.bfloat16):
        got, state = mixer(x, None, None, (cos, sin))
        one, _ = mixer.step(x[:, 0], state, (cos[:, :1], sin[:, :1]))
    assert (got - want).norm() <= tolerance(mixer) * want.norm() and bool(one.isfinite().all())
    assert [z.dtype for z in state] == [z.dtype for z in want_state]
