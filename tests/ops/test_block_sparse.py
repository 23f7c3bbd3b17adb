"""block_sparse against a float64 oracle (law 5), poison, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farspan.attention.kv import KV
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.partial import Partial
from farspan.attention.selection import BlockIndex
from farspan.attention.softmax import Softmax

from .tools import (
    Run,
    assert_grads_equal,
    assert_law_5,
    assert_reference,
    every_run,
    make_qkv,
    oracle,
)


def random_blocks(
    b: int, hs: int, tq: int, tk: int, block_q: int, block_k: int, m: int,
    *, starts: list[int] | None = None, empty: bool = False, order: bool = False, seed: int = 0,
) -> BlockIndex:  # fmt: skip
    """m random blocks at most per query block, junk past the count; empty: some query blocks read nothing."""
    generator = torch.Generator().manual_seed(seed)
    nq, nk = -(-tq // block_q), -(-tk // block_k)
    chosen = torch.rand(b, hs, nq, nk, generator=generator).topk(min(m, nk), -1).indices.sort(-1).values
    counts = torch.randint(0 if empty else 1, chosen.shape[-1] + 1, (b, hs, nq), generator=generator)
    if empty:
        counts[:, :, nq // 2] = 0
    used = torch.arange(chosen.shape[-1]) < counts[..., None]
    key_order = None
    if order:
        key_order = torch.arange(tk).repeat(b, hs, 1)
        for row in range(b):
            first = starts[row] if starts else 0
            key_order[row, :, first:] = first + torch.rand(hs, tk - first, generator=generator).argsort(-1)
    return BlockIndex(
        blocks=torch.where(used, chosen, 7777).int(),
        counts=counts.int(),
        block_q=block_q,
        block_k=block_k,
        start=None if starts is None else torch.tensor(starts),
        key_order=key_order,
    )


BLOCK_CASES = [  # b, h, hkv, hs, tq, tk, d, block_q, block_k, m, starts, empty, order, softcap
    (1, 4, 4, 4, 63, 63, 16, 16, 16, 2, None, False, False, None),
    (2, 8, 2, 2, 500, 500, 64, 64, 64, 3, None, False, False, None),
    (1, 8, 2, 8, 500, 500, 64, 64, 32, 4, None, False, False, None),
    (1, 4, 2, 2, 200, 1021, 128, 64, 64, 5, None, False, False, None),
    (2, 4, 2, 2, 500, 500, 80, 64, 64, 3, [0, 337], False, False, None),
    (2, 4, 2, 4, 63, 500, 16, 16, 8, 9, [13, 470], True, False, None),
    (2, 4, 2, 2, 300, 300, 16, 32, 32, 3, None, True, False, 5.0),
    (2, 4, 2, 2, 200, 300, 16, 32, 16, 6, [0, 140], False, True, None),
    (1, 4, 2, 4, 300, 300, 16, 32, 16, 6, None, False, True, None),
]
TRITON_RUNS = [
    Run("triton", "cpu", torch.float32),
    Run("triton", "cpu", torch.float16),
    *(
        pytest.param(Run("triton", "cuda", dtype), marks=pytest.mark.gpu)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ),
]
GRADIENT_CASES = [  # the same columns
    (1, 4, 4, 4, 63, 63, 16, 16, 16, 2, None, False, False, None),
    (1, 8, 2, 2, 100, 200, 24, 64, 64, 3, None, False, False, None),
    (1, 4, 1, 4, 130, 150, 16, 64, 32, 3, None, False, False, None),
    (1, 4, 2, 2, 150, 150, 16, 128, 16, 6, None, True, False, 5.0),
    (2, 2, 1, 1, 63, 150, 16, 16, 8, 9, [13, 120], True, False, None),
    (2, 4, 2, 4, 60, 100, 16, 32, 16, 4, [0, 60], False, True, None),
]


@every_run()
@pytest.mark.parametrize("case", BLOCK_CASES, ids=lambda c: "-".join(map(str, c)))
def test_block_sparse(case: tuple, run: Run) -> None:
    b, h, hkv, hs, tq, tk, d, block_q, block_k, m, starts, empty, order, softcap = case
    index = random_blocks(b, hs, tq, tk, block_q, block_k, m, starts=starts, empty=empty, order=order)
    q, k, v = make_qkv(b, h, hkv, tq, tk, d, dtype=run.dtype, starts=starts)
    mask = index.to_mask(tq, tk)
    for x in (k, v):
        read = mask.any(2).view(b, hkv, hs // hkv, tk).any(2)
        x[~read] = torch.nan
    how = {"scale": d**-0.5, "softcap": softcap}
    truth = oracle(q, k, v, mask, **how)
    given = KV(k, v), index, Softmax(**how)
    reference = block_sparse(q, *given, impl="reference")
    assert_reference(reference, truth)
    got = block_sparse(run.to(q), *run.to(given), impl=run.impl)
    assert_law_5(got, reference, truth)


@pytest.mark.parametrize("case", [c for c in BLOCK_CASES if c[5] <= 300], ids=lambda c: "-".join(map(str, c)))
def test_block_sparse_gradients(case: tuple) -> None:
    b, h, hkv, hs, tq, tk, d, block_q, block_k, m, starts, empty, order, softcap = case
    index = random_blocks(b, hs, tq, tk, block_q, block_k, m, starts=starts, empty=empty, order=order)
    leaves = [x.double() for x in make_qkv(b, h, hkv, tq, tk, d, roomy=False)]
    mask = index.to_mask(tq, tk)
    seen = mask.repeat_interleave(h // hs, 1).any(-1)
    how = {"scale": d**-0.5, "softcap": softcap}
    weight = torch.randn(b, h, tq, d, dtype=torch.float64)
    results = []
    for run in (
        lambda q, k, v: block_sparse(q, KV(k, v), index, Softmax(**how), impl="eager"),
        lambda q, k, v: oracle(q, k, v, mask, **how),
    ):
        leaf = [x.clone().requires_grad_() for x in leaves]
        part = run(*leaf)
        loss = (part.out * weight).sum() + part.lse[seen].cos().sum()
        results.append(list(torch.autograd.grad(loss, leaf)))
    assert_grads_equal(*results)


def _gradients(
    run: Callable[..., Partial], leaves: Sequence[Tensor], weight: Tensor, seen: Tensor
) -> list[Tensor]:
    """dq, dk, dv of a loss that both out and lse reach."""
    leaf = [x.detach().clone().requires_grad_() for x in leaves]
    part = run(*leaf)
    loss = (part.out.to(weight) * weight).sum() + part.lse[seen].to(weight).cos().sum()
    return list(torch.autograd.grad(loss, leaf))


@pytest.mark.parametrize("run", TRITON_RUNS, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: "-".join(map(str, c)))
def test_block_sparse_gradients_in_low_precision(case: tuple, run: Run) -> None:
    """Law 5 for gradients: error <= 2 x that of autograd through the same-dtype reference, and roundings."""
    b, h, hkv, hs, tq, tk, d, block_q, block_k, m, starts, empty, order, softcap = case
    index = random_blocks(b, hs, tq, tk, block_q, block_k, m, starts=starts, empty=empty, order=order)
    leaves = make_qkv(b, h, hkv, tq, tk, d, dtype=run.dtype, roomy=False)
    mask = index.to_mask(tq, tk)
    seen = mask.repeat_interleave(h // hs, 1).any(-1)
    how = {"scale": d**-0.5, "softcap": softcap}
    weight = torch.randn(b, h, tq, d, generator=torch.Generator().manual_seed(1))

    def device_run(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        return block_sparse(q, KV(k, v), run.to(index), Softmax(**how), impl=run.impl)

    truth = _gradients(
        lambda q, k, v: oracle(q, k, v, mask, **how), [x.double() for x in leaves], weight.double(), seen
    )

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        return block_sparse(q, KV(k, v), index, Softmax(**how), impl="reference")

    same = _gradients(reference, leaves, weight, seen)
    at = run.to((*leaves, weight, seen))
    got = _gradients(device_run, at[:3], *at[3:])
    for name, a, r, t in zip("qkv", got, same, truth, strict=True):
        assert a.dtype == run.dtype
        error, allowed = ((x.cpu().double() - t).abs().max() for x in (a, r))
        rounding = torch.finfo(run.dtype).eps / 2 if run.dtype != torch.float32 else 0  # p and ds in 16 bits
        allowed = (
            2 * allowed + rounding * t.abs().max() + 2 * torch.finfo(torch.float32).eps * (1 + t.abs().max())
        )
        assert error <= allowed, f"d{name}: error {error:.2e}, allowed {allowed:.2e}"
    for x in at[1:3]:
        x[~mask.any(2).view(b, hkv, hs // hkv, tk).any(2)] = torch.nan
    for a, again in zip(got, _gradients(device_run, at[:3], *at[3:]), strict=True):
        assert torch.equal(a, again), (
            "two runs differ, or NaN where the index does not point reached a gradient"
        )


def test_block_sparse_gradients_only_where_asked() -> None:
    index = random_blocks(1, 2, 48, 48, 16, 16, 2)
    leaves = make_qkv(1, 4, 2, 48, 48, 16, roomy=False)
    results = []
    for wanted in ((0, 1, 2), (0,), (1,), (2,)):
        leaf = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
        part = block_sparse(leaf[0], KV(*leaf[1:]), index, Softmax(0.25), impl="triton")
        part.out.sum().backward()  # dout is a stride-0 view, and there is no dlse
        results.append([x.grad for x in leaf])
        assert [x is not None for x in results[-1]] == [i in wanted for i in range(3)]
        for i in wanted:
            assert torch.equal(results[-1][i], results[0][i])
    leaf = [x.clone().requires_grad_() for x in leaves]
    block_sparse(leaf[0], KV(*leaf[1:]), index, Softmax(0.25), impl="triton").lse.sum().backward()
    assert bool((leaf[2].grad == 0).all()), "the lse does not depend on the values"


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_block_sparse_serves_a_strided_query(impl: str) -> None:
    """Models hand over q as a transposed view [B, T, H, D] -> [B, H, T, D]."""
    index = random_blocks(2, 2, 63, 63, 16, 16, 2)
    q, k, v = make_qkv(2, 4, 2, 63, 63, 16)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    plain, got = (block_sparse(x, KV(k, v), index, Softmax(0.25), impl=impl) for x in (q, strided))
    assert torch.allclose(got.out, plain.out, atol=1e-6)
    assert torch.allclose(got.lse, plain.lse, atol=1e-6)


@pytest.mark.parametrize("order", [False, True])
def test_block_sparse_gradcheck(order: bool) -> None:
    index = random_blocks(1, 2, 9, 11, 4, 4, 2, order=order, seed=1)
    leaves = [x.double().requires_grad_() for x in make_qkv(1, 4, 2, 9, 11, 3, roomy=False)]
    seen = index.to_mask(9, 11).repeat_interleave(2, 1).any(-1)

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        part = block_sparse(q, KV(k, v), index, Softmax(0.5, 3.0), impl="eager")
        return part.out, part.lse[seen]

    assert torch.autograd.gradcheck(run, leaves)


def test_transposed_lists_every_reader_once() -> None:
    from farspan.attention.ops.block_sparse.backward import transposed  # triton is optional

    b, hs, nk = 2, 3, 7
    index = random_blocks(b, hs, 90, 112, 16, 16, 4, empty=True)
    readers, offsets = transposed(index.blocks, index.counts, nk)
    for x in range(b * hs * nk):
        row, head, j = x // (hs * nk), x // nk % hs, x % nk
        lists = [
            blocks[:count].tolist()
            for blocks, count in zip(index.blocks[row, head], index.counts[row, head].tolist(), strict=True)
        ]
        want = [n for n, blocks in enumerate(lists) if j in blocks]
        assert readers[offsets[x] : offsets[x + 1]].tolist() == want


@pytest.mark.parametrize("impl", ["reference", "eager", "triton"])
@pytest.mark.parametrize("order", [False, True])
def test_block_sparse_of_an_index_with_a_lead(impl: str, order: bool) -> None:
    """f05: as the last queries of the call with which its first query block began."""
    q, k, v = make_qkv(1, 4, 2, 100, 130, 16)
    whole = random_blocks(1, 2, 100, 130, 16, 8, 5, order=order)
    for lead in (1, 13):
        want = block_sparse(q, KV(k, v), whole, Softmax(0.25), impl=impl)
        got = block_sparse(q[:, :, lead:], KV(k, v), replace(whole, lead=lead), Softmax(0.25), impl=impl)
        assert torch.equal(got.lse, want.lse[:, :, lead:]) and torch.equal(got.out, want.out[:, :, lead:])
    with pytest.raises(ValueError, match="needs the lead of its index among the 3 keys before the queries"):
        block_sparse(q, KV(k[:, :, :103], v[:, :, :103]), replace(whole, lead=5), Softmax(0.25))


def test_block_sparse_refuses_an_index_of_another_shape() -> None:
    q, k, v = make_qkv(1, 4, 2, 40, 40, 8)
    good = random_blocks(1, 2, 40, 40, 16, 16, 2)
    for blocks, counts in [
        (good.blocks[:, :, :2], good.counts[:, :, :2]),
        (good.blocks, good.counts[:, :, :2]),
        (good.blocks.repeat(2, 1, 1, 1), good.counts.repeat(2, 1, 1)),
        (good.blocks.repeat(1, 3, 1, 1), good.counts.repeat(1, 3, 1)),
    ]:
        index = BlockIndex(blocks=blocks, counts=counts, block_q=16, block_k=16)
        with pytest.raises(ValueError, match=r"block_sparse takes blocks \[B, Hkv or H, 3, M\]"):
            block_sparse(q, KV(k, v), index, Softmax(1.0))
