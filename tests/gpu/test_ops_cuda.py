"""The ops on a CUDA device against the float64 definition, under law 5's bound."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.index import BlockIndex, TokenIndex
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.decode import decode
from farspan.attention.ops.flash import flash
from farspan.attention.ops.gather_decode import gather_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="these tests compare CUDA kernels; there is no CUDA device"
    ),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _inputs(tq, tk, dtype, d=64):
    torch.manual_seed(tq + tk)
    q = torch.randn(2, 8, tq, d, dtype=torch.float64)
    k, v = (torch.randn(2, 2, tk, d, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype).cuda() for x in (q, k, v)]


def _within(op, q, k, v, *args, **how):
    """Error at most twice that of the same-dtype definition, both against float64."""
    truth = op(q.double(), k.double(), v.double(), *args, impl="reference", **how)
    same = op(q, k, v, *args, impl="reference", **how)
    got = op(q, k, v, *args, **how)
    allowed = 2 * (same.out.double() - truth.out).abs().max() + 4 * torch.finfo(q.dtype).eps
    assert (got.out.double() - truth.out).abs().max() <= allowed
    finite = truth.lse > -torch.inf
    assert torch.equal(got.lse > -torch.inf, finite)
    assert (got.lse.double() - truth.lse)[finite].abs().max() <= 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tq", "tk"), [(500, 500), (63, 1021)])
@pytest.mark.parametrize("how", [{}, {"window": 100}, {"softcap": 20.0}, {"start": [0, 50]}], ids=str)
def test_flash(dtype, tq, tk, how):
    if "start" in how:
        how = {"start": torch.tensor(how["start"]).cuda()}
    _within(flash, *_inputs(tq, tk, dtype), scale=0.125, **how)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tq", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_decode(dtype, tq, padded):
    start = torch.tensor([0, 400]).cuda() if padded else None
    _within(decode, *_inputs(tq, 1021, dtype), scale=0.125, start=start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_decode(dtype):
    q, k, v = _inputs(2, 1021, dtype)
    tokens = torch.stack([torch.randperm(1000)[:64].sort().values for _ in range(8)]).view(2, 2, 2, 64).cuda()
    _within(gather_decode, q, k, v, TokenIndex(tokens=tokens), scale=0.125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sparse(dtype):
    q, k, v = _inputs(500, 500, dtype)
    own = torch.arange(8)
    blocks = torch.stack([torch.zeros_like(own), own], -1).expand(2, 2, 8, 2).int().cuda()
    counts = torch.where(own == 0, 1, 2).expand(2, 2, 8).int().cuda()
    index = BlockIndex(blocks=blocks, counts=counts, block_q=64, block_k=64)
    _within(block_sparse, q, k, v, index, scale=0.125)
