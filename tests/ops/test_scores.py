"""scores against the definition."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.ops.scores import scores

from .tools import make_qkv

IMPLS = ["reference", "eager"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tk", "d"), [(63, 16), (500, 80), (1021, 128), (20000, 64)])
def test_scores(tk: int, d: int, dtype: torch.dtype) -> None:
    """float32 all the way for 16-bit inputs: the error of summing d products, never a rounding to bf16."""
    q, k, _ = make_qkv(2, 4, 2, 3, tk, d, dtype=dtype)
    truth = torch.einsum("bngtd,bnkd->bngtk", q.double().view(2, 2, 2, 3, d), k.double()) * 0.3
    errors = {}
    for impl in IMPLS:
        got = scores(q, k, scale=0.3, impl=impl)
        assert got.dtype == torch.float32 and got.shape == truth.shape
        errors[impl] = (got - truth).abs().max()
    assert errors["reference"] <= 1e-5
    assert errors["eager"] <= 2 * errors["reference"] + 1e-6


def test_scores_refuses_shapes_that_do_not_fit() -> None:
    q, k, _ = make_qkv(2, 4, 2, 3, 20, 8)
    for bad in [(q[:1], k), (q[:, :3], k), (q[..., :4], k)]:
        with pytest.raises(ValueError, match=r"scores got q .* do not fit together"):
            scores(*bad)
