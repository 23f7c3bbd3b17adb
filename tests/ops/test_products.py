"""bf16 attention out of matrix products, where kernel.attend takes it, against float64 (law 5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.kv import KV
from farspan.attention.ops import kernel, products
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.flash import flash
from farspan.attention.ops.reference import masked_attention
from farspan.attention.partial import Partial
from farspan.attention.softmax import Softmax

from .test_block_sparse import random_blocks
from .tools import assert_law_5, make_qkv, oracle

chosen = pytest.mark.skipif(
    not products._cpu_has_products(), reason="this CPU multiplies bf16 in AMX tiles, or not at all"
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in both directions at sizes that a test can afford."""
    monkeypatch.setattr(products, "_ROWS", 128)
    monkeypatch.setattr(products, "_KEYS", 256)
    products._space.cache_clear()
    yield
    products._space.cache_clear()


def inputs(tq: int, tk: int, d: int, sharpness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = make_qkv(1, 2, 2, tq, tk, d, dtype=torch.bfloat16)
    return (q * sharpness).bfloat16(), k, v


def check(got: Partial, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **how: Any) -> None:
    assert_law_5(got, masked_attention(q, k, v, mask, **how), oracle(q, k, v, mask, **how))


@pytest.mark.parametrize("sharpness", [1.0, 8.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("tq", "tk", "d"), [(128, 512, 64), (300, 900, 80), (130, 513, 128)])
def test_every_key(tq: int, tk: int, d: int, softcap: float | None, sharpness: float) -> None:
    q, k, v = inputs(tq, tk, d, sharpness)
    how = {"scale": d**-0.5, "softcap": softcap}
    got = products.attend(q, k, v, Softmax(**how), causal=False, mask=None)
    check(got, q, k, v, torch.ones(1, 1, tq, tk, dtype=torch.bool), **how)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("t", "first"), [(600, 0), (777, 256), (513, 512)])
def test_causal(t: int, first: int, softcap: float | None) -> None:
    q, k, v = inputs(t, t, 64)
    how = {"scale": 0.125, "softcap": softcap}
    got = products.attend(q, k, v, Softmax(**how), causal=True, mask=None, first=first)
    mask = torch.ones(t, t, dtype=torch.bool).tril()[None, None]
    check(got, q[:, :, first:], k, v, mask[:, :, first:], **how)


@pytest.mark.parametrize("late", [1, 70, 400, 513])
def test_a_mask_of_the_last_keys(late: int) -> None:
    """Rows that read nothing, where the mask covers every key, give (0, -inf)."""
    q, k, v = inputs(200, 513, 64)
    tail = torch.rand(1, 2, 200, late, generator=torch.Generator().manual_seed(0)) < 0.3
    tail[:, :, 7] = False
    got = products.attend(q, k, v, Softmax(0.125), causal=False, mask=tail)
    whole = torch.cat([torch.ones(1, 2, 200, 513 - late, dtype=torch.bool), tail], -1)
    check(got, q, k, v, whole, scale=0.125)


@chosen
def test_both_kernels_give_the_causal_rows_they_are_best_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_FEW_KEYS", 300)
    taken: list[int] = []
    attend = products.attend
    monkeypatch.setattr(products, "attend", lambda *a, **how: taken.append(how["first"]) or attend(*a, **how))
    q, k, v = inputs(700, 700, 96)
    got = flash(q, KV(k, v), Softmax(0.1))
    assert taken == [300]
    check(got, q, k, v, torch.ones(700, 700, dtype=torch.bool).tril()[None, None], scale=0.1)


@chosen
@pytest.mark.parametrize("order", [False, True])
def test_block_sparse_runs_on_products(order: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    attend = products.attend
    monkeypatch.setattr(
        products, "attend", lambda q, *a, **how: calls.append(q.shape[2]) or attend(q, *a, **how)
    )
    q, k, v = make_qkv(1, 8, 2, 260, 1021, 64, dtype=torch.bfloat16)
    index = random_blocks(1, 2, 260, 1021, 64, 64, 12, order=order)
    got = block_sparse(q, KV(k, v), index, Softmax(0.125))
    assert calls and set(calls) <= {256, 16}, "the heads of a group are rows of one tile"
    check(got, q, k, v, index.to_mask(260, 1021), scale=0.125)


@pytest.mark.parametrize("heads_last", [False, True])
def test_keys_of_any_layout(heads_last: bool) -> None:
    q, k, v = make_qkv(1, 8, 2, 260, 1021, 64, dtype=torch.bfloat16)
    index = random_blocks(1, 2, 260, 1021, 64, 64, 12)
    want = block_sparse(q, KV(k, v), index, Softmax(0.125))
    if heads_last:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    got = block_sparse(q, KV(k, v), index, Softmax(0.125))
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


@chosen
def test_few_rows_or_keys_stay_with_torchs_kernel() -> None:
    for tq, tk in ((127, 4096), (4096, 511)):
        q, k, _ = inputs(tq, tk, 64)
        assert not products.serves(q, k, 1.0)
    q, k, _ = inputs(128, 512, 64)
    assert not products.serves(q.float(), k.float(), 1.0)


def test_what_is_kept_between_calls_outlives_inference_mode() -> None:
    q, k, v = make_qkv(1, 8, 2, 260, 1021, 64, dtype=torch.bfloat16)
    index = random_blocks(1, 2, 260, 1021, 64, 64, 12)
    products._space.cache_clear()
    with torch.inference_mode():
        inside = block_sparse(q, KV(k, v), index, Softmax(0.125))
    assert torch.equal(block_sparse(q, KV(k, v), index, Softmax(0.125)).out, inside.out)
    leaf = q.clone().requires_grad_()
    block_sparse(leaf, KV(k, v), index, Softmax(0.125)).out.sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
