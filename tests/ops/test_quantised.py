"""Keys and values in 8 and 4 bits: how they are rounded, parts of them, and operations on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.kv import KV
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.decode import decode
from farspan.attention.ops.flash import flash
from farspan.attention.ops.gather_decode import gather_decode
from farspan.attention.packing import Int4, Int8
from farspan.attention.quantised import Quantised
from farspan.attention.selection import TokenIndex
from farspan.attention.softmax import Softmax

from .quantised import PACKINGS, quantised, rounded
from .test_block_sparse import random_blocks
from .tools import make_qkv

FORMATS = pytest.mark.parametrize("name", PACKINGS)
OUTLIERS = pytest.mark.parametrize("outliers", [0, 4])
SOFTMAX = Softmax(0.25, 5.0)


@FORMATS
@OUTLIERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_is_the_definition(name: str, outliers: int, dtype: torch.dtype) -> None:
    """Keys by channel and group of positions, values by position and group of numbers; padding inside a group
    has no part in it."""
    packing = PACKINGS[name]
    k, v = (5 * torch.randn(2, 2, 100, 64)).to(dtype), torch.randn(2, 2, 100, 48).to(dtype)
    k[1, :, :37] = torch.nan  # padding may hold anything
    v[1, :, :37] = torch.inf
    valid = torch.arange(96) >= torch.tensor([[0], [37]])
    kv = quantised(packing, k, v, 96, outliers=outliers, valid=valid)
    got_k, got_v = kv.dense(torch.float64)
    size = packing.value_group(48)
    for b, h, first in ((0, 0, 0), (1, 1, 37)):
        for begin in range(first - first % packing.group, 96, packing.group):
            rows = slice(max(begin, first), begin + packing.group)
            for c in range(0, 64 - outliers, 7):
                torch.testing.assert_close(
                    got_k[b, h, rows, c], rounded(k[b, h, rows, c], packing.bits), rtol=1e-5, atol=1e-5
                )
        for t in range(first, 96, 11):
            for c in range(0, 48, size):
                want = rounded(v[b, h, t, c : c + size], packing.bits)
                torch.testing.assert_close(got_v[b, h, t, c : c + size], want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got_k[b, h, 96:], k[b, h, 96:].double())
        assert torch.equal(got_k[b, h, first:, 64 - outliers :], k[b, h, first:, 64 - outliers :].double())


@FORMATS
def test_constant_groups_and_extreme_numbers(name: str) -> None:
    """A constant group is exact; numbers near the ends of bfloat16 neither overflow nor vanish."""
    packing = PACKINGS[name]
    k = torch.full((1, 1, 64, 16), 3.0).bfloat16()
    k[..., 1] = -1e38
    k[..., 2] = 0
    k[..., 3] = (torch.rand(64) - 0.5).bfloat16() * 3e38
    k[..., 4] = torch.randn(64).bfloat16() * 1e-30
    kv = quantised(packing, k, k, 64)
    got, wide = kv.dense(torch.float64)[0], k.double()
    assert torch.equal(got[..., :3], wide[..., :3])
    for c in (3, 4):
        spread = wide[..., c].unflatten(2, (-1, packing.group))
        half = (spread.amax(3) - spread.amin(3)) / (2**packing.bits - 1) / 2
        error = (got[..., c] - wide[..., c]).abs().unflatten(2, (-1, packing.group)).amax(3)
        assert bool((error <= half * 1.02).all())


@FORMATS
@OUTLIERS
def test_parts_of_it(name: str, outliers: int) -> None:
    k, v = torch.randn(2, 3, 110, 16), torch.randn(2, 3, 110, 24)
    kv = quantised(PACKINGS[name], k, v, 96, outliers=outliers)
    want = kv.dense()
    assert kv.shape == (2, 3, 110) == (kv.batch, kv.num_kv_heads, kv.length)
    assert (kv.head_dim, kv.value_dim, kv.dtype) == (16, 24, torch.float32)
    assert kv.nbytes == sum(x.nbytes for x in kv.stored)
    for a, b in ((0, 110), (5, 40), (17, 96), (33, 104), (64, 65), (96, 110), (7, 7)):
        some = kv[1:, [2, 0], a:b]
        assert (type(some) is KV) == (a >= min(96, b))
        assert some.shape == (1, 2, b - a)
        for x, got in zip(want, some.dense(), strict=True):
            assert torch.equal(got, x[1:, [2, 0], a:b])
        if b > a:
            inner = some[:, :, 1:]
            assert torch.equal(inner.k, want[0][1:, [2, 0], a + 1 : b])
    rows = torch.randint(0, 110, (2, 3, 9))
    for x, got in zip(want, kv.gather(rows).dense(), strict=True):
        assert torch.equal(got, x.gather(2, rows[..., None].expand(-1, -1, -1, x.shape[3])))
    heads, rows = torch.tensor([2, 0, 0, 1]), torch.randint(0, 110, (4, 5))
    for x, got in zip(want, kv[:1].at(heads, rows).dense(), strict=True):
        assert torch.equal(got, torch.stack([x[0, h, r] for h, r in zip(heads, rows, strict=True)])[:, None])
    view = kv.map(lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1))[1]
    assert torch.equal(view.k, want[0][1, :, None].expand(-1, 2, -1, -1))
    assert view.stored[0].data_ptr() == kv[1:].stored[0].data_ptr(), "a view copies nothing"


@FORMATS
def test_refused(name: str) -> None:
    with pytest.raises(farspan.FarspanError, match="groups of 16, 32"):
        (Int8 if name == "int8" else Int4)(group=48)
    with pytest.raises(farspan.FarspanError, match="two numbers into a byte"):
        quantised(Int4(), torch.randn(1, 1, 32, 17), torch.randn(1, 1, 32, 17), 32)


def _calls(starts: list[int] | None) -> dict[str, object]:
    start = None if starts is None else torch.tensor(starts)
    tokens = torch.rand(2, 2, 3, 117).topk(40, -1).indices.sort(-1).values
    index = TokenIndex(tokens=tokens, counts=torch.randint(1, 41, (2, 2, 3), dtype=torch.int32))
    blocks = random_blocks(2, 2, 3, 120, 16, 8, 6, starts=starts)
    return {
        "decode": lambda q, kv, impl: decode(q, kv, SOFTMAX, start=start, impl=impl),
        "window": lambda q, kv, impl: decode(q, kv, SOFTMAX, window=60, sinks=4, start=start, impl=impl),
        "flash": lambda q, kv, impl: flash(q, kv, SOFTMAX, start=start, impl=impl),
        "gather": lambda q, kv, impl: gather_decode(q, kv, index, SOFTMAX, impl=impl),
        "blocks": lambda q, kv, impl: block_sparse(q, kv, blocks, SOFTMAX, impl=impl),
    }


@FORMATS
@OUTLIERS
@pytest.mark.parametrize("starts", [None, [0, 37]])
@pytest.mark.parametrize("op", ["decode", "window", "flash", "gather", "blocks"])
@pytest.mark.parametrize("run", ["eager float32", "eager bfloat16", "triton float32"])
def test_operations(name: str, outliers: int, starts: list[int] | None, op: str, run: str) -> None:
    """Against the reference in float64 over the numbers that the format holds. Products with codes and with
    zeros partly cancel, which float32 shows: 8 times the error of the reference in the same dtype."""
    impl, kind = run.split()
    torch.manual_seed(len(op))
    dtype = getattr(torch, kind)
    q, k, v = make_qkv(2, 4, 2, 3, 120, 16, dtype=dtype)
    kv, call = quantised(PACKINGS[name], k, v, 96, outliers=outliers), _calls(starts)[op]
    exact = KV(*kv.dense(torch.float64))
    want = call(q.double(), exact, "reference")
    same = call(q, exact.map(lambda x: x.to(dtype)), "reference")
    got = call(q, kv, impl)
    for field in ("out", "lse"):
        a, b, t = (getattr(x, field).double().nan_to_num(neginf=0) for x in (got, same, want))
        tiny = 1e-5 if kind == "float32" else 1e-3
        assert (a - t).abs().max() <= 8 * (b - t).abs().max() + tiny


@FORMATS
@pytest.mark.parametrize("rows", [1, 100])
def test_no_more_than_a_block_is_decoded(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows decode no key at all; many rows decode a part of the keys at a time."""
    monkeypatch.setattr("farspan.attention.quantised._NUMBERS", 1 << 10)
    seen: list[int] = []
    original = Quantised.dense

    def dense(self: Quantised, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        seen.append(self.length)
        return original(self, dtype)

    monkeypatch.setattr(Quantised, "dense", dense)
    q, k, v = make_qkv(1, 4, 2, rows, 600, 16)
    kv = quantised(PACKINGS[name], k, v, 480)
    flash(q, kv, SOFTMAX, impl="eager")
    assert seen == [] if rows == 1 else (max(seen) == 64 and sum(seen) == 480)
