"""scores, pool, top_k and gather_rows: reference and eager against the definition."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.ops.pool import pool
from farspan.attention.ops.rows import gather_rows
from farspan.attention.ops.scores import scores
from farspan.attention.ops.select import top_k

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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", ["mean", "min", "max"])
@pytest.mark.parametrize("starts", [None, [0, 5, 62], [63, 0, 17]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pool(impl: str, mode: str, starts: list[int] | None, dtype: torch.dtype) -> None:
    b = 3 if starts else 1
    _, x, _ = make_qkv(b, 2, 2, 1, 63, 16, dtype=dtype, starts=starts)
    got = pool(x, 8, mode=mode, start=None if starts is None else torch.tensor(starts), impl=impl)
    assert got.shape == (b, 2, 8, 16) and got.dtype == dtype
    for row in range(b):
        first = starts[row] if starts else 0
        for j in range(8):
            piece = x[row, :, first + 8 * j : min(first + 8 * j + 8, 63)].double()
            if piece.shape[1] == 0:
                assert bool((got[row, :, j] == 0).all()), "blocks past the end of a row are zero"
                continue
            want = {"mean": piece.mean(1), "min": piece.amin(1), "max": piece.amax(1)}[mode]
            if mode == "mean":
                tolerance = 2 * torch.finfo(dtype).eps * piece.abs().max()
                assert (got[row, :, j].double() - want).abs().max() <= tolerance
            else:
                assert torch.equal(got[row, :, j].double(), want)


def test_pool_refuses_unknown_modes_and_empty_blocks() -> None:
    x = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="pool knows the modes mean, min, max; got 'median'"):
        pool(x, 2, mode="median")
    with pytest.raises(ValueError, match="at least 1 position; got 0"):
        pool(x, 0, mode="mean")


def _brute_top_k(row: list[float], k: int, order: str) -> list[int]:
    ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return ranked if order == "score" else sorted(ranked)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("levels", [2, 5, None])
@pytest.mark.parametrize("k", [1, 7, 62, 63, 100])
def test_top_k_gives_ties_to_the_lowest_position(impl: str, order: str, levels: int | None, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, 63, generator=generator)
    if levels is not None:
        x = (x * levels).floor()
    x[0, 0, 10:40] = -torch.inf  # not to be had
    x[1, 1, 30:33] = torch.inf  # forced
    got = top_k(x, k, order=order, impl=impl)
    assert got.shape == (3, 2, min(k, 63)) and got.dtype == torch.int64
    for a in range(3):
        for b in range(2):
            assert got[a, b].tolist() == _brute_top_k(x[a, b].tolist(), min(k, 63), order)


def test_top_k_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="k of at least 1; got 0"):
        top_k(torch.zeros(3), 0)
    with pytest.raises(ValueError, match="'position' or 'score'; got 'size'"):
        top_k(torch.zeros(3), 1, order="size")


def _layouts() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    room = torch.randn(3, 4, 40, 8)
    return {
        "contiguous": torch.randn(3, 4, 20, 8),
        "roomy": room[:, :, :20],
        "beginning later": room[1:, :, 7:27],
        "one row": room[2:3, 1:2, 5:25],
        "heads last": torch.randn(3, 20, 4, 8).transpose(1, 2),
        "expanded": torch.randn(1, 4, 20, 8).expand(3, -1, -1, -1),
        "every second": room[:, :, ::2],
        "channels first": torch.randn(3, 4, 8, 20).transpose(2, 3),
        "wide rows": torch.randn(3, 4, 20, 11)[..., :8],
    }


@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("grad", [False, True])
def test_gather_rows_reads_any_layout(layout: str, grad: bool) -> None:
    x = _layouts()[layout]
    if grad:
        x = x.requires_grad_()
    b, h, t, d = x.shape
    rows = torch.randint(0, t, (b, h, 13), generator=torch.Generator().manual_seed(0))
    want = x.gather(2, rows[..., None].expand(b, h, 13, d))
    for index in (rows, rows.int()):
        got = gather_rows(x, index)
        assert torch.equal(got, want)
    if grad:
        assert got.requires_grad
