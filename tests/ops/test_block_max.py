"""block_max against probabilities written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.errors import Unsupported
from farspan.attention.ops.block_max import block_max
from farspan.attention.softmax import Softmax

from .tools import Run, brute_mask, every_run, make_qkv, oracle


def _truth(probabilities: Tensor, block_q: int, block_k: int, starts: list[int]) -> Tensor:
    """Pooled block by block, from where each row begins."""
    b, h, tq, tk = probabilities.shape
    out = torch.zeros(b, h, -(-tq // block_q), -(-tk // block_k), dtype=torch.float64)
    for row, first in enumerate(starts):
        for i in range(tq):
            for j in range(tk):
                p = probabilities[row, :, i, j]
                n = (i - max(0, first - (tk - tq))) // block_q
                if n >= 0 and j >= first:
                    cell = out[row, :, n, (j - first) // block_k]
                    torch.maximum(cell, p, out=cell)
    return out


def _make(
    tq: int, tk: int, d: int, starts: list[int] | None, softcap: float | None, dtype: torch.dtype
) -> Any:
    """q, k, lse and the float64 probabilities [2, 4, Tq, Tk]; padding and invisible rows are NaN."""
    b = 2
    q, k, v = make_qkv(b, 4, 2, tq, tk, d, dtype=dtype, starts=starts)
    mask = brute_mask(tq, tk, starts or [0] * b)
    part = oracle(q, k, v, mask, scale=0.3, softcap=softcap)
    logits = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double().repeat_interleave(2, 1)) * 0.3
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    truth = torch.where(mask, torch.exp(logits - part.lse[..., None]), 0.0)
    for row, first in enumerate(starts or []):
        q[row, :, : max(0, first - (tk - tq))] = torch.nan
    return q, k, part.lse.float(), truth


CASES = [
    # tq, tk, D, block_q, block_k, starts, softcap
    (63, 63, 16, 16, 16, None, None),
    (63, 63, 16, 64, 32, [0, 17], None),
    (21, 63, 24, 8, 16, [0, 50], 2.0),
    (63, 63, 16, 1, 64, [5, 62], None),
    (9, 63, 16, 5, 7, [63, 57], None),
    (1, 40, 80, 64, 64, None, None),
]


@every_run()
@pytest.mark.parametrize("heads", ["each", "group"])
@pytest.mark.parametrize(("tq", "tk", "d", "block_q", "block_k", "starts", "softcap"), CASES)
def test_block_max(
    run: Run,
    heads: str,
    tq: int,
    tk: int,
    d: int,
    block_q: int,
    block_k: int,
    starts: list[int] | None,
    softcap: float | None,
) -> None:
    q, k, lse, probabilities = _make(tq, tk, d, starts, softcap, run.dtype)
    truth = _truth(probabilities, block_q, block_k, starts or [0, 0])
    if heads == "group":
        truth = truth.unflatten(1, (2, 2)).amax(2)
    how: dict[str, Any] = {"softmax": Softmax(0.3, softcap), "block_q": block_q, "block_k": block_k}
    start = None if starts is None else torch.tensor(starts)
    same = block_max(q, k, lse, **how, start=start, heads=heads, impl="reference")
    got = block_max(*map(run.to, (q, k, lse)), **how, start=run.to(start), heads=heads, impl=run.impl)
    assert got.dtype == torch.float32 and got.shape == truth.shape
    assert torch.equal(got.cpu() == 0, truth == 0)
    error, allowed = ((x.cpu().double() - truth).abs().max() for x in (got, same))
    assert allowed < 1e-5 and error <= 2 * allowed + 4e-7


@every_run()
@pytest.mark.parametrize(("block_q", "block_k"), [(300, 100), (64, 300), (129, 31)])
def test_blocks_larger_than_a_tile(run: Run, block_q: int, block_k: int) -> None:
    q, k, lse, probabilities = _make(310, 330, 16, [0, 100], None, run.dtype)
    start, how = torch.tensor([0, 100]), {"softmax": Softmax(0.3), "block_q": block_q, "block_k": block_k}
    got = block_max(*map(run.to, (q, k, lse)), **how, start=run.to(start), impl=run.impl).cpu()
    for row, first in enumerate([0, 100]):
        begin = max(0, first - 20)
        for n in range(got.shape[2]):
            for j in range(got.shape[3]):
                a, c = begin + n * block_q, first + j * block_k
                cell = probabilities[row, :, a : a + block_q, c : c + block_k]
                want = cell.flatten(1).amax(1) if cell.numel() else torch.zeros(4).double()
                assert (got[row, :, n, j] - want).abs().max() < 2e-6


@every_run()
def test_transposed_queries_and_lse(run: Run) -> None:
    """q and lse as a model makes them: views of [B, T, H, D] and [B, T, H]."""
    q, k, lse, probabilities = _make(40, 63, 16, None, None, run.dtype)
    q = run.to(q.transpose(1, 2).contiguous()).transpose(1, 2)
    lse = run.to(lse.transpose(1, 2).contiguous()).transpose(1, 2)
    got = block_max(q, run.to(k), lse, Softmax(0.3), block_q=16, block_k=16, impl=run.impl)
    assert (got.cpu() - _truth(probabilities, 16, 16, [0, 0])).abs().max() < 2e-6


def test_float64_stays_float64_and_carries_no_gradient() -> None:
    q, k, _ = make_qkv(1, 2, 1, 20, 20, 8, dtype=torch.float64)
    lse = torch.logsumexp((q @ k.transpose(-1, -2)).masked_fill(~brute_mask(20, 20, [0]), -torch.inf), -1)
    how: dict[str, Any] = {"softmax": Softmax(1.0), "block_q": 4, "block_k": 4}
    got = block_max(q.requires_grad_(), k, lse, **how, impl="eager")
    want = block_max(q, k, lse, **how, impl="reference")
    assert got.dtype == want.dtype == torch.float64
    assert not got.requires_grad and not want.requires_grad
    assert (got - want).abs().max() < 1e-14


def test_no_queries() -> None:
    q, k, lse, _ = _make(5, 9, 16, None, None, torch.float32)
    for impl in ("reference", "eager", "triton"):
        got = block_max(q[:, :, :0], k, lse[:, :, :0], Softmax(1.0), block_q=4, block_k=4, impl=impl)
        assert got.shape == (2, 4, 0, 3)


def test_block_max_refuses() -> None:
    q, k, lse, _ = _make(5, 9, 16, None, None, torch.float32)
    how: dict[str, Any] = {"softmax": Softmax(1.0), "block_q": 4, "block_k": 4}
    with pytest.raises(ValueError, match=r"lse \[B, H, Tq\] = \[2, 4, 5\], one per query; got \[2, 4, 4\]"):
        block_max(q, k, lse[:, :, 1:], **how)
    with pytest.raises(ValueError, match="queries among the keys; got Tq = 5 > Tk = 4"):
        block_max(q, k[:, :, :4], lse, **how)
    with pytest.raises(ValueError, match="at least 1 position; got 0 and 4"):
        block_max(q, k, lse, **how | {"block_q": 0})
    with pytest.raises(ValueError, match="'each' or per 'group'; got 'all'"):
        block_max(q, k, lse, **how, heads="all")
    with pytest.raises(ValueError, match="do not fit together"):
        block_max(q, k[..., :4], lse, **how)
    with pytest.raises(Unsupported, match="no backward"):
        block_max(q.clone().requires_grad_(), k, lse, **how, impl="triton")
    with pytest.raises(Unsupported, match="float64 is none of"):
        block_max(q.double(), k.double(), lse, **how, impl="triton")
