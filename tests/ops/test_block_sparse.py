"""block_sparse against a float64 oracle (law 5), poison, gradients."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.index import BlockIndex
from farspan.attention.ops.block_sparse import block_sparse

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
    reference = block_sparse(q, k, v, index, impl="reference", **how)
    assert_reference(reference, truth)
    got = block_sparse(*run.to((q, k, v)), run.to(index), impl=run.impl, **how)
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
        lambda q, k, v: block_sparse(q, k, v, index, impl="eager", **how),
        lambda q, k, v: oracle(q, k, v, mask, **how),
    ):
        leaf = [x.clone().requires_grad_() for x in leaves]
        part = run(*leaf)
        loss = (part.out * weight).sum() + part.lse[seen].cos().sum()
        results.append(list(torch.autograd.grad(loss, leaf)))
    assert_grads_equal(*results)


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
            block_sparse(q, k, v, index, scale=1.0)
