"""pool against the definition."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.ops.pool import pool

from .tools import make_qkv

IMPLS = ["reference", "eager"]


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
