"""pool and pool_segments against the definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from farspan.attention.ops.pool import pool, pool_segments
from farspan.attention.sources import Sources
from farspan.attention.summary import BlockPool

from .tools import Run, every_run, make_qkv

MODES = ["mean", "min", "max", "length_normalised", ("max", "min", "mean"), ("length_normalised", "max")]


def check(got: Tensor, pieces: list[list[Tensor]], modes: tuple[str, ...], dtype: torch.dtype) -> None:
    """got [B * Hkv, N, len(modes) * D] in ``dtype`` against pieces[row][n] [n_tokens, D]."""
    assert got.dtype == dtype
    for row, of_row in zip(got.cpu().double(), pieces, strict=True):
        for entry, piece in zip(row, of_row, strict=True):
            piece, parts = piece.double(), entry.chunk(len(modes))
            for mode, part in zip(modes, parts, strict=True):
                if piece.shape[0] == 0:
                    assert bool((part == 0).all()), "blocks past the end of a row are zero"
                elif mode in ("min", "max"):
                    assert torch.equal(part, piece.amin(0) if mode == "min" else piece.amax(0))
                else:
                    factor = 1.0 if mode == "mean" else len(piece) ** 0.5
                    tolerance = 2 * torch.finfo(dtype).eps * piece.abs().max() * factor
                    assert bool(((part - piece.mean(0) * factor).abs() <= tolerance).all())


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("starts", [None, [0, 5, 62], [63, 0, 17]], ids=str)
@pytest.mark.parametrize(("block", "d"), [(8, 16), (5, 80)])
@every_run()
def test_pool(mode: str | tuple[str, ...], starts: list[int] | None, block: int, d: int, run: Run) -> None:
    b, modes = (3 if starts else 1), ((mode,) if isinstance(mode, str) else mode)
    _, x, _ = make_qkv(b, 2, 2, 1, 63, d, dtype=run.dtype, starts=starts)
    start = None if starts is None else torch.tensor(starts)
    count = -(-63 // block)
    begins = [first + j * block for first in starts or [0] for j in range(count)]
    pieces = [
        [x[row, head, min(a, 63) : min(a + block, 63)] for a in begins[row * count : (row + 1) * count]]
        for row in range(b)
        for head in range(2)
    ]
    for impl, one, begin in ((run.impl, run.to(x), run.to(start)), ("reference", x, start)):
        got = pool(one, block, mode=mode, start=begin, impl=impl)
        assert got.shape == (b, 2, count, len(modes) * d)
        check(got.flatten(0, 1), pieces, modes, run.dtype)


@pytest.mark.parametrize("block", [1, 70, 200])
@every_run()
def test_pool_over_blocks_of_any_length(block: int, run: Run) -> None:
    """One position, more than a program takes in one step, more than there is; x as models hand it over."""
    x = make_qkv(1, 2, 2, 1, 150, 64, dtype=run.dtype)[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert not x.is_contiguous()
    got = pool(run.to(x), block, mode=("mean", "max"), impl=run.impl)
    check(got[0], [list(x[0, head].split(block)) for head in range(2)], ("mean", "max"), run.dtype)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("per_head", [False, True])
@every_run()
def test_pool_segments(mode: str | tuple[str, ...], per_head: bool, run: Run) -> None:
    """Empty ones, one of a single position, one longer than a program's step; what lies outside is not
    read."""
    modes = (mode,) if isinstance(mode, str) else mode
    _, x, _ = make_qkv(2, 2, 2, 1, 63, 80, dtype=run.dtype, starts=[3, 0])
    of_row = torch.tensor([[3, 3, 4, 44, 44, 57, 63], [0, 10, 20, 30, 40, 50, 60]], dtype=torch.int32)
    bounds = of_row
    if per_head:
        bounds = torch.stack([of_row, torch.tensor([7, 9, 30, 31, 32, 40, 41]).expand(2, -1)], 1)
    for impl, one, where in ((run.impl, run.to(x), run.to(bounds)), ("reference", x, bounds)):
        got = pool_segments(one, where, mode=mode, impl=impl)
        assert got.shape == (2, 2, 6, len(modes) * 80)
        pieces = [
            [
                x[row, head, a:b]
                for a, b in pairwise((bounds[row, head] if per_head else of_row[row]).tolist())
            ]
            for row in range(2)
            for head in range(2)
        ]
        check(got.flatten(0, 1), pieces, modes, run.dtype)


@every_run()
def test_segments_of_one_length_are_blocks(run: Run) -> None:
    """Bit for bit in Triton; eager pools the two by operations of torch that round differently."""
    x = run.to(make_qkv(1, 2, 2, 1, 63, 16, dtype=run.dtype)[1])
    bounds = run.to(torch.tensor([[0, 16, 32, 48, 63]]))
    mode = ("mean", "min", "max")
    blocks = pool(x, 16, mode=mode, impl=run.impl)
    segments = pool_segments(x, bounds, mode=mode, impl=run.impl)
    rounding = 0 if run.impl == "triton" else 2 * torch.finfo(run.dtype).eps
    assert torch.allclose(blocks, segments, rtol=rounding, atol=rounding)
    assert torch.equal(blocks, pool(x, 16, mode=mode, impl=run.impl)), "the same twice"


@pytest.mark.parametrize("mode", ["mean", "min", "max", "length_normalised"])
def test_gradients_reach_every_position(mode: str) -> None:
    """Eager, blocks and segments alike: the gradient of the definition, in float64."""
    x = make_qkv(1, 2, 2, 1, 20, 4, roomy=False)[1].double().requires_grad_()
    bounds = torch.tensor([[0, 8, 16, 20]])
    pooled = [pool(x, 8, mode=mode, impl=i) for i in ("reference", "eager")]
    pooled.append(pool_segments(x, bounds, mode=mode, impl="eager"))
    want, *others = [torch.autograd.grad(p.square().sum(), x)[0] for p in pooled]
    for got in others:
        assert torch.allclose(got, want, rtol=1e-12)


def test_a_summary_lays_its_modes_side_by_side() -> None:
    _, x, _ = make_qkv(1, 2, 2, 1, 63, 16)
    both = BlockPool(8, ("max", "min")).compute(Sources({"keys": x}))
    assert torch.equal(both, torch.cat([pool(x, 8, mode="max"), pool(x, 8, mode="min")], -1))


def test_bad_input_is_refused_in_a_sentence() -> None:
    x, bounds = torch.zeros(1, 1, 4, 2), torch.tensor([[0, 4]])
    known = "mean, min, max, length_normalised"
    with pytest.raises(ValueError, match=f"pool knows the modes {known}; got 'median'"):
        pool(x, 2, mode="median")
    with pytest.raises(ValueError, match=f"pool_segments knows the modes {known}; got 'median'"):
        pool_segments(x, bounds, mode=("mean", "median"))
    for modes in ((), ("mean", "mean")):
        with pytest.raises(ValueError, match=r"pool needs one or more of .*, each once"):
            pool(x, 2, mode=modes)
    with pytest.raises(ValueError, match="at least 1 position; got 0"):
        pool(x, 0, mode="mean")
    for bad in (bounds[0], bounds.expand(2, -1), bounds.expand(1, 3, 2), bounds[:, :0]):
        with pytest.raises(ValueError, match=r"pool_segments takes bounds \[B, S \+ 1\]"):
            pool_segments(x, bad, mode="mean")
    with pytest.raises(ValueError, match="bounds of an integer type"):
        pool_segments(x, bounds.float(), mode="mean")


def test_pool_refuses_tensors_that_do_not_fit() -> None:
    x = torch.zeros(2, 1, 8, 4)
    for bad, start, message in [
        (x[0], None, r"floating x \[B, Hkv, T, D\]; got \[1, 8, 4\]"),
        (x.int(), None, "floating x"),
        (x, torch.tensor([1]), r"start \[B\] = \[2\]; got \[1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool(bad, 4, mode="mean", start=start)
