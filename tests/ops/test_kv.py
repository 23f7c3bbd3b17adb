"""Keys and values as one value: what it says of itself, and operations on another format than the plain
one."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.ops import kernel
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.decode import decode
from farspan.attention.ops.flash import flash
from farspan.attention.ops.gather_decode import gather_decode
from farspan.attention.partial import Partial
from farspan.attention.selection import TokenIndex
from farspan.attention.softmax import Softmax
from farspan.attention.summary import BlockPool

from .doubled import Doubled
from .test_block_sparse import random_blocks
from .tools import make_qkv

FORMATS = pytest.mark.parametrize("form", [KV, Doubled])
IMPLS = pytest.mark.parametrize("impl", ["reference", "eager", "triton"])
SOFTMAX = Softmax(0.25, 5.0)


def assert_equal(a: Partial, b: Partial) -> None:
    assert torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


@FORMATS
def test_what_it_says_of_itself(form: type[KV]) -> None:
    k, v = torch.randn(2, 3, 7, 8).bfloat16(), torch.randn(2, 3, 7, 4).bfloat16()
    kv = form.encode(k, v)
    assert kv.shape == (2, 3, 7) == (kv.batch, kv.num_kv_heads, kv.length)
    assert (kv.head_dim, kv.value_dim) == (8, 4)
    assert kv.dtype == kv.value_dtype == torch.bfloat16 and kv.device == k.device
    more = 2 if form is Doubled else 0  # bytes of a factor
    assert kv.row_nbytes == 24 + more and kv.nbytes == 42 * (24 + more)
    assert kv.key_nbytes == 42 * (16 + more)
    assert torch.equal(kv.k, k) and torch.equal(kv.v, v)
    assert not kv.requires_grad
    assert form.encode(k.requires_grad_(), v).requires_grad


@FORMATS
def test_parts_of_it(form: type[KV]) -> None:
    """Slices of rows, heads and positions, single rows per KV head, and views: the same of keys and
    values."""
    k, v = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4)
    kv = form.encode(k, v)
    for index in ((slice(1, 2),), (slice(None), slice(0, 2), slice(2, 5)), (slice(None), [2, 2, 0])):
        some = kv[index]
        assert type(some) is form
        assert torch.equal(some.k, k[index]) and torch.equal(some.v, v[index])
    rows = torch.tensor([[[6, 0], [3, 3], [1, 2]], [[0, 1], [2, 3], [4, 5]]])
    some = kv.gather(rows)
    assert type(some) is form and some.shape == (2, 3, 2)
    for x, got in zip((k, v), some.dense(), strict=True):
        assert torch.equal(got, x.gather(2, rows[..., None].expand(-1, -1, -1, x.shape[3])))
    wide = kv.map(lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1))[0]
    assert torch.equal(wide.k, k[0, :, None].expand(-1, 2, -1, -1))
    assert wide.stored[0].data_ptr() == kv.stored[0].data_ptr(), "a view copies nothing"


@FORMATS
def test_summaries_and_raw_keys_are_those_of_the_numbers(form: type[KV]) -> None:
    k, v = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    keys = Keys(kv=form.encode(k, v), tq=1, softmax=SOFTMAX)
    assert torch.equal(keys.summary(BlockPool(4)), k.unflatten(2, (5, 4)).mean(3))
    before = keys.summary_bytes
    assert torch.equal(keys.read_all_keys(), k)
    assert keys.summary_bytes - before == keys.kv.key_nbytes
    assert torch.equal(keys.row(1).kv.k, k[1:])


@IMPLS
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("starts", [None, [0, 77]])
def test_flash_and_decode(impl: str, window: int | None, starts: list[int] | None) -> None:
    start = None if starts is None else torch.tensor(starts)
    for op, tq in ((flash, 30), (decode, 1), (decode, 5)):
        q, k, v = make_qkv(2, 8, 2, tq, 150, 24, starts=starts)
        want = op(q, KV(k, v), SOFTMAX, window=window, start=start, impl=impl)
        got = op(q, Doubled.encode(k, v), SOFTMAX, window=window, start=start, impl=impl)
        assert_equal(got, want)


@IMPLS
@pytest.mark.parametrize("order", [False, True])
def test_block_sparse(impl: str, order: bool) -> None:
    index = random_blocks(2, 2, 50, 100, 16, 16, 3, starts=[0, 33], order=order)
    q, k, v = make_qkv(2, 4, 2, 50, 100, 24)
    want = block_sparse(q, KV(k, v), index, SOFTMAX, impl=impl)
    assert_equal(block_sparse(q, Doubled.encode(k, v), index, SOFTMAX, impl=impl), want)


@IMPLS
def test_gradients_flow_back_through_a_format(impl: str) -> None:
    """Keys and values that are loaded from a format get the gradients of plain ones."""
    index, results = random_blocks(1, 2, 32, 48, 16, 16, 2), []
    for form in (KV, Doubled):
        leaves = [x.requires_grad_() for x in make_qkv(1, 4, 2, 32, 48, 16, roomy=False)]
        part = block_sparse(leaves[0], form.encode(*leaves[1:]), index, SOFTMAX, impl=impl)
        results.append(torch.autograd.grad(part.out.square().sum(), leaves))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@IMPLS
def test_gather_decode(impl: str) -> None:
    q, k, v = make_qkv(2, 8, 2, 3, 200, 24)
    tokens = torch.rand(2, 2, 3, 200).topk(60, -1).indices.sort(-1).values
    index = TokenIndex(tokens=tokens, counts=torch.randint(1, 61, (2, 2, 3), dtype=torch.int32))
    want = gather_decode(q, KV(k, v), index, SOFTMAX, impl=impl)
    assert_equal(gather_decode(q, Doubled.encode(k, v), index, SOFTMAX, impl=impl), want)
    # Rows beside the index have a format of their own, which need not be the store's.
    one = TokenIndex(tokens=tokens[:, :, :1], gathered=KV(k, v).gather(tokens[:, :, 0]))
    plain = TokenIndex(tokens=tokens[:, :, :1])
    want = gather_decode(q[:, :, :1], KV(k, v), plain, SOFTMAX, impl=impl)
    assert_equal(gather_decode(q[:, :, :1], Doubled.encode(k, v), one, SOFTMAX, impl=impl), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_library_kernel(dtype: torch.dtype) -> None:
    q, k, v = make_qkv(1, 2, 2, 9, 30, 16, dtype=dtype)
    want = kernel.attend(q, KV(k, v), Softmax(0.25))
    assert_equal(kernel.attend(q, Doubled.encode(k, v), Softmax(0.25)), want)
