"""Four-bit keys and what is estimated from them, against float64 arithmetic on the same integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.errors import Unsupported
from farspan.attention.ops.int4_scores import Int4, int4_block_max, int4_scores, quantise_int4
from farspan.attention.ops.scores import scores
from farspan.attention.softmax import Softmax

from .tools import Run, every_run, make_qkv


def _integers(packed: Tensor) -> Tensor:
    """Nibble by nibble: low ones are the first half of a row."""
    low, high = packed.long() % 16, packed.long() // 16
    both = torch.cat([low, high], -1)
    return torch.where(both > 7, both - 16, both)


def _parts(k4: Int4) -> tuple[Tensor, Tensor]:
    """Each key's mean and the rest of it, float64 [B, Hkv, T, D]; zeros in the padding."""
    varying = _integers(k4.packed).double() * k4.scale.double()[..., None]
    mean = torch.zeros_like(varying)
    for row in range(len(mean)):
        first = 0 if k4.start is None else int(k4.start[row])
        for t in range(first, mean.shape[2]):
            mean[row, :, t] = k4.mean[row, :, (t - first) // k4.block].double()
        varying[row, :, :first] = 0
    return mean, varying


def _keys(b: int, t: int, d: int, starts: list[int] | None, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Keys far from zero, as real ones are: their means are what four bits could not carry."""
    _, k, _ = make_qkv(b, 2, 2, 1, t, d, seed=seed, starts=starts)
    k = k + 10 * torch.randn(1, 2, 1, d, generator=torch.Generator().manual_seed(seed + 1))
    k[-1, 0, -2:] = 1.5  # with blocks of equal keys nothing varies
    return k.to(dtype)


SHAPES = [
    # T, D, block, starts
    (64, 16, 16, None),
    (63, 80, 32, [0, 17]),
    (130, 64, 8, [130, 126]),
    (63, 10, 64, [62, 1]),
    (1, 128, 32, None),
    (300, 256, 128, [0, 100]),
]


@every_run()
@pytest.mark.parametrize(("t", "d", "block", "starts"), SHAPES)
def test_quantise(run: Run, t: int, d: int, block: int, starts: list[int] | None) -> None:
    k = _keys(2, t + 1, d, starts, run.dtype)[:, :, :t]  # a view of a longer buffer
    start = None if starts is None else torch.tensor(starts)
    k4 = quantise_int4(run.to(k), block, start=run.to(start), impl=run.impl)
    assert k4.packed.shape == (2, 2, t, d // 2) and k4.packed.dtype == torch.uint8
    assert k4.scale.shape == (2, 2, t) and k4.scale.dtype == torch.float32
    assert k4.mean.shape == (2, 2, -(-t // block), d) and k4.mean.dtype == run.dtype
    k4 = Run("", "cpu", run.dtype).to(k4)
    mean, varying = _parts(k4)
    integers = _integers(k4.packed)
    for row, first in enumerate(starts or [0, 0]):
        assert bool((k4.packed[row, :, :first] == 0).all()) and bool((k4.scale[row, :, :first] == 0).all())
        blocks = -(-(t - first) // block)
        assert bool((k4.mean[row, :, blocks:] == 0).all()), "blocks that hold nothing"
        for j in range(blocks):
            at = slice(first + j * block, first + (j + 1) * block)
            exact = k[row, :, at].double().mean(1)
            rounding = max(torch.finfo(run.dtype).eps, 1e-6) * (1 + exact.abs())
            assert bool(((k4.mean[row, :, j].double() - exact).abs() <= rounding).all())
        rest = k[row, :, first:].double() - mean[row, :, first:]
        step = rest.abs().amax(-1) / 7
        assert bool(((k4.scale[row, :, first:] - step).abs() <= 1e-6 * step + 1e-6).all())
        error = (varying[row, :, first:] - rest).abs()
        assert bool((error <= step[..., None] * 0.50001 + 2e-6).all()), "to the nearest of fifteen"
    assert int(integers.abs().max()) <= 7
    assert torch.allclose(k4.dequantise().double(), mean + varying, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "eager", "triton"])
@pytest.mark.parametrize("starts", [None, [3, 40]])
def test_a_store_requantises_only_the_open_block(impl: str, starts: list[int] | None) -> None:
    """Law 7: what is said of a block depends on the keys of that block alone."""
    k = _keys(2, 150, 16, starts, torch.float32)
    whole = quantise_int4(k, 32, start=None if starts is None else torch.tensor(starts), impl=impl)
    for row, first in enumerate(starts or [0, 0]):
        for done in (first, first + 31, first + 32, 120):
            begin = first + (done - first) // 32 * 32
            tail = quantise_int4(k[row : row + 1, :, begin:], 32, impl=impl)
            assert torch.equal(tail.packed[0], whole.packed[row, :, begin:])
            assert torch.equal(tail.scale[0], whole.scale[row, :, begin:])
            j = (begin - first) // 32
            assert torch.equal(tail.mean[0], whole.mean[row, :, j : j + tail.mean.shape[2]])


@every_run()
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("t", "d", "block", "starts"), SHAPES)
def test_scores(run: Run, queries: int, t: int, d: int, block: int, starts: list[int] | None) -> None:
    start = None if starts is None else torch.tensor(starts)
    k4 = quantise_int4(_keys(2, t, d, starts, run.dtype), block, start=start, impl="reference")
    q = torch.randn(2, 6, queries, d, generator=torch.Generator().manual_seed(2)).to(run.dtype)
    keys = sum(_parts(k4))
    truth = torch.einsum("bngtd,bnkd->bngtk", q.double().unflatten(1, (2, 3)), keys) * 0.3
    same = int4_scores(q, k4, scale=0.3, impl="reference")
    got = int4_scores(run.to(q), run.to(k4), scale=0.3, impl=run.impl)
    assert got.dtype == torch.float32 and got.shape == (2, 2, 3, queries, t)
    error, allowed = ((x.cpu().double() - truth).abs().max() for x in (got, same))
    assert allowed < 1e-4 and error <= 2 * allowed + 1e-6 * (1 + truth.abs().max())


def test_scores_estimate_the_logits() -> None:
    """The means carry what all keys of a block share: without them four bits would lose the rest in it."""
    k = _keys(2, 200, 64, None, torch.float32)
    q = torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(3))
    exact = scores(q, k, Softmax(0.125))
    error = int4_scores(q, quantise_int4(k, 32), scale=0.125) - exact
    assert error.std() < 0.15 and exact.std() > 5


BLOCK_CASES = [
    # Tq, T, D, block_q, block, starts, softcap, q_bits
    (63, 63, 16, 16, 16, None, None, 8),
    (63, 63, 80, 64, 32, [0, 17], None, 4),
    (21, 63, 24, 8, 16, [0, 50], 2.0, 8),
    (40, 150, 64, 64, 32, [139, 3], 3.0, None),
    (9, 63, 16, 5, 8, [63, 57], None, 8),
    (1, 40, 10, 64, 64, None, None, 4),
    (300, 310, 16, 129, 128, [0, 100], None, 8),
    (150, 150, 16, 64, 128, [0, 150], None, 8),  # a row that is all padding
]


def _pooled(values: Tensor, block_q: int, block_k: int, starts: list[int]) -> Tensor:
    """Largest visible value of each block, cell by cell; -inf where there is none."""
    b, h, tq, tk = values.shape
    out = torch.full((b, h, -(-tq // block_q), -(-tk // block_k)), -torch.inf, dtype=torch.float64)
    for row, first in enumerate(starts):
        begin = max(0, first - (tk - tq))
        for i in range(begin, tq):
            for j in range(out.shape[3]):
                seen = values[
                    row, :, i, first + j * block_k : min(first + (j + 1) * block_k, tk - tq + i + 1)
                ]
                if seen.shape[1]:
                    cell = out[row, :, (i - begin) // block_q, j]
                    torch.maximum(cell, seen.amax(1), out=cell)
    return out


@every_run()
@pytest.mark.parametrize(("tq", "t", "d", "block_q", "block", "starts", "softcap", "q_bits"), BLOCK_CASES)
def test_block_max(
    run: Run,
    tq: int,
    t: int,
    d: int,
    block_q: int,
    block: int,
    starts: list[int] | None,
    softcap: float | None,
    q_bits: int | None,
) -> None:
    start = None if starts is None else torch.tensor(starts)
    k4 = quantise_int4(_keys(2, t, d, starts, run.dtype), block, start=start, impl="reference")
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, tq, d, generator=generator).to(run.dtype)
    q[0, 1, tq // 2] = 0.0  # nothing to round
    offset = 5 * torch.randn(2, 4, tq, generator=generator)
    mean, varying = (x.repeat_interleave(2, 1) for x in _parts(k4))
    rounded = q.double()
    if q_bits is not None:
        levels = 127 if q_bits == 8 else 7
        step = q.float().abs().amax(-1, keepdim=True) / levels
        whole = (q.float() / step.clamp(min=1e-30) + 0.5).floor().clamp(-levels, levels)
        rounded = whole.double() * step.double()
    logits = (rounded @ varying.mT + q.double() @ mean.mT) * 0.3
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    truth = _pooled(logits - offset.double()[..., None], block_q, block, starts or [0, 0])
    for row, first in enumerate(starts or []):  # what lies in the padding is nobody's business
        q[row, :, : max(0, first - (t - tq))] = torch.nan
        offset[row, :, : max(0, first - (t - tq))] = torch.nan
        k4.packed[row, :, :first], k4.scale[row, :, :first] = 99, torch.nan
    how: dict[str, Any] = {"softmax": Softmax(0.3, softcap), "block_q": block_q, "q_bits": q_bits}
    same = int4_block_max(q, k4, offset, **how, impl="reference")
    got = int4_block_max(run.to(q), run.to(k4), run.to(offset), **how, impl=run.impl).cpu()
    assert got.dtype == torch.float32 and got.shape == truth.shape
    assert torch.equal(got == -torch.inf, truth == -torch.inf)
    some = truth > -torch.inf
    error, allowed = ((x.double() - truth)[some].abs().max() for x in (got, same))
    assert allowed < 1e-4 and error <= 2 * allowed + 1e-6 * (1 + truth[some].abs().max())


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_later_keys_do_not_matter(impl: str) -> None:
    """Queries that lie before a store's last keys' blocks: NaN in what is written later changes nothing."""
    k4 = quantise_int4(_keys(1, 96, 16, None, torch.float32), 16)
    q, offset = torch.randn(1, 4, 96, 16), torch.zeros(1, 4, 96)
    how: dict[str, Any] = {"softmax": Softmax(0.3), "block_q": 16, "impl": impl}
    want = int4_block_max(q, k4, offset, **how)[:, :, :3, :3]
    k4.scale[:, :, 48:], k4.mean[:, :, 3:] = torch.nan, torch.nan
    assert torch.equal(int4_block_max(q, k4, offset, **how)[:, :, :3, :3], want)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_views(impl: str) -> None:
    """q and offsets as a model makes them, and a store's buffers with room to grow."""
    k4 = quantise_int4(_keys(2, 40, 16, None, torch.float32), 16)
    room = {"packed": torch.full((2, 2, 60, 8), 99, dtype=torch.uint8)}
    room |= {"scale": torch.full((2, 2, 60), torch.nan), "mean": torch.full((2, 2, 9, 16), torch.nan)}
    view = {}
    for name, buffer in room.items():
        held = getattr(k4, name)
        view[name] = buffer[:, :, : held.shape[2]]
        view[name][:] = held
    roomy = Int4(**view, block=16)
    q = torch.randn(2, 40, 4, 16).transpose(1, 2)
    offset = torch.randn(2, 40, 4).transpose(1, 2)
    got = int4_block_max(q, roomy, offset, Softmax(1.0), block_q=16, impl=impl)
    want = int4_block_max(q.contiguous(), k4, offset.contiguous(), Softmax(1.0), block_q=16, impl="reference")
    some = want > -torch.inf
    assert torch.equal(got > -torch.inf, some) and (got - want)[some].abs().max() < 1e-4
    got = int4_scores(q[:, :, -2:], roomy, impl=impl)
    assert (got - int4_scores(q[:, :, -2:], k4, impl="reference")).abs().max() < 1e-4


def test_float64() -> None:
    k, q = _keys(2, 50, 6, None, torch.float64), torch.randn(2, 4, 50, 6, dtype=torch.float64)
    k4, want = (quantise_int4(k, 7, impl=impl) for impl in ("eager", "reference"))
    assert torch.equal(k4.packed, want.packed) and (k4.mean - want.mean).abs().max() < 1e-13
    for bits in (None, 8, 4):
        one, two = (
            int4_block_max(q, want, q[..., 0], Softmax(1.0), block_q=8, q_bits=bits, impl=impl)
            for impl in ("eager", "reference")
        )
        some = two > -torch.inf
        assert one.dtype == torch.float64 and (one - two)[some].abs().max() < 1e-12


def test_refusals() -> None:
    k = torch.randn(2, 2, 20, 16)
    with pytest.raises(ValueError, match=r"even D, two numbers a byte; got \[2, 2, 20, 15\]"):
        quantise_int4(k[..., :15], 32)
    with pytest.raises(ValueError, match="at least 1 position; got 0"):
        quantise_int4(k, 0)
    with pytest.raises(ValueError, match=r"start \[B\] = \[2\], each row's first valid position; got \[3\]"):
        quantise_int4(k, 32, start=torch.zeros(3))
    k4 = quantise_int4(k, 32)
    q, offset = torch.randn(2, 4, 6, 16), torch.zeros(2, 4, 6)
    how: dict[str, Any] = {"softmax": Softmax(1.0), "block_q": 64}
    with pytest.raises(ValueError, match=r"q \[2, 4, 6, 8\] and four-bit keys \[2, 2, 20, 16\]"):
        int4_scores(q[..., :8], k4)
    with pytest.raises(ValueError, match=r"q \[2, 3, 6, 16\] and four-bit keys"):
        int4_block_max(q[:, :3], k4, offset, **how)
    with pytest.raises(ValueError, match="queries among the keys; got Tq = 21 > Tk = 20"):
        int4_block_max(torch.randn(2, 4, 21, 16), k4, torch.zeros(2, 4, 21), **how)
    with pytest.raises(
        ValueError, match=r"row_offset \[B, H, Tq\] = \[2, 4, 6\], one per query; got \[2, 4, 5\]"
    ):
        int4_block_max(q, k4, offset[..., 1:], **how)
    with pytest.raises(ValueError, match="at least 1 query; got 0"):
        int4_block_max(q, k4, offset, Softmax(1.0), block_q=0)
    with pytest.raises(ValueError, match=r"4 or 8 bits, or not at all \(None\); got 6"):
        int4_block_max(q, k4, offset, **how, q_bits=6)
    with pytest.raises(ValueError, match="scale above 0; got 0"):
        int4_block_max(q, k4, offset, Softmax(0), block_q=64)


def test_triton_says_what_it_cannot() -> None:
    k = torch.randn(2, 2, 20, 16)
    with pytest.raises(Unsupported, match="blocks of 20 keys are not of 8, 16, 32, 64 or 128"):
        quantise_int4(k, 20, impl="triton")
    with pytest.raises(Unsupported, match="no backward"):
        quantise_int4(k.clone().requires_grad_(), 32, impl="triton")
    k4 = quantise_int4(k, 32)
    with pytest.raises(Unsupported, match=r"queries are torch\.float16, the keys were torch\.float32"):
        int4_scores(torch.randn(2, 4, 1, 16).half(), k4, impl="triton")
    with pytest.raises(Unsupported, match="no backward"):
        int4_scores(torch.randn(2, 4, 1, 16).requires_grad_(), k4, impl="triton")
