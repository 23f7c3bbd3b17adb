"""scores against the definition."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.ops.scores import scores
from farspan.attention.softmax import Softmax

from .tools import Run, every_run, make_qkv


@pytest.mark.parametrize(
    ("t", "n", "d"), [(3, 63, 16), (1, 500, 80), (3, 1021, 128), (1, 5000, 64), (100, 130, 80), (2, 63, 200)]
)
@every_run()
def test_scores(t: int, n: int, d: int, run: Run) -> None:
    """float32 all the way for 16-bit inputs: the error of summing d products, never a rounding to 16 bits."""
    q, k, _ = make_qkv(2, 4, 2, t, n, d, dtype=run.dtype)
    truth = torch.einsum("bngtd,bnkd->bngtk", q.double().view(2, 2, 2, t, d), k.double()) * 0.3
    errors = {}
    for impl, a, b in ((run.impl, run.to(q), run.to(k)), ("reference", q, k)):
        got = scores(a, b, Softmax(0.3), impl=impl)
        assert got.dtype == torch.float32 and got.shape == truth.shape
        errors[impl] = (got.cpu() - truth).abs().max()
    assert errors["reference"] <= 1e-5 * max(1, d / 64)
    assert errors[run.impl] <= 2 * errors["reference"] + 1e-6


@every_run()
def test_softcap(run: Run) -> None:
    q, k, _ = make_qkv(1, 2, 1, 3, 70, 32, dtype=run.dtype)
    plain = scores(run.to(q), run.to(k), Softmax(0.3), impl=run.impl)
    bent = scores(run.to(q), run.to(k), Softmax(0.3, 2.0), impl=run.impl)
    assert (bent - 2 * torch.tanh(plain / 2)).abs().max() <= 1e-6
    assert float(plain.abs().max()) > 2 > float(bent.abs().max())


@every_run()
def test_strided_views_and_the_same_twice(run: Run) -> None:
    """q as models hand it over, [B, T, H, D] transposed; k, a part of a wider summary."""
    q, k, _ = make_qkv(2, 4, 2, 3, 70, 32, dtype=run.dtype)
    plain = scores(run.to(q), run.to(k).contiguous(), impl=run.impl)
    q, k = run.to(q.transpose(1, 2).contiguous()).transpose(1, 2), run.to(torch.cat([k, k * 2], -1))[..., :32]
    assert not q.is_contiguous() and not k.is_contiguous()
    got = scores(q, k, impl=run.impl)
    assert torch.equal(got, scores(q, k, impl=run.impl))
    assert (got - plain).abs().max() <= 1e-5


def test_scores_refuses_shapes_that_do_not_fit() -> None:
    q, k, _ = make_qkv(2, 4, 2, 3, 20, 8)
    for bad in [(q[:1], k), (q[:, :3], k), (q[..., :4], k)]:
        with pytest.raises(ValueError, match=r"scores got q .* do not fit together"):
            scores(*bad)
