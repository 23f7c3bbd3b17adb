"""Each configuration that the tuner may choose computes the same: forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.kv import KV
from farspan.attention.lists import BlockLists
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.decode import decode
from farspan.attention.ops.flash import flash
from farspan.attention.ops.gather_decode import gather_decode
from farspan.attention.partial import Partial
from farspan.attention.selection import TokenIndex
from farspan.attention.softmax import Softmax

from .test_block_sparse import _gradients, random_blocks
from .tools import Run, assert_law_5, brute_mask, make_qkv, oracle

pytest.importorskip("triton")  # before what imports it
launch = import_module("farspan.attention.ops.launch")
triton, backward = (import_module(f"farspan.attention.ops.block_sparse.{n}") for n in ("triton", "backward"))

# name of the list of configurations, block_q, block_k, D under the interpreter and on a GPU, dtype
FORMS = [
    ("half", 32, 16, (16, 128), torch.float16),
    ("half", 64, 64, (16, 128), torch.float16),
    ("whole_blocks", 128, 128, (16, 128), torch.float16),
    ("wide_half", 32, 32, (136, 256), torch.float16),
    ("single", 32, 16, (16, 64), torch.float32),
]


def forms() -> list[Any]:
    """Every form with each of the longest list's configurations."""
    cases = []
    for name, block_q, block_k, widths, dtype in FORMS:
        kernels = (triton._run_forward, backward._run_backward_q, backward._run_backward_kv)
        with forms_of_a_gpu(dtype):
            count = max(len(kernel(dtype, launch.wide(widths[0]), block_k).configs) for kernel in kernels)
        for n in range(count):
            for device, d in zip(("cpu", "cuda"), widths, strict=True):
                marks = [pytest.mark.gpu] if device == "cuda" else []
                run, named = Run("triton", device, dtype), f"{name}-{block_k}-{n}-{device}"
                cases.append(pytest.param(n, block_q, block_k, d, run, marks=marks, id=named))
    return cases


@contextmanager
def forms_of_a_gpu(dtype: torch.dtype) -> Iterator[None]:
    """float32 takes the configurations of a GPU inside, which the interpreter otherwise does not."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float32 and launch.INTERPRETED:
            patch.setattr(launch, "cannot_launch", lambda device: [])
            patch.setattr(launch, "INTERPRETED", False)
        yield


def case(block_q: int, block_k: int, d: int, dtype: torch.dtype) -> tuple[list[Tensor], BlockLists]:
    tq, tk = block_q + 9, 2 * block_k + 70
    leaves = make_qkv(1, 4, 2, tq, tk, d, dtype=dtype, roomy=False)
    return list(leaves), random_blocks(1, 2, tq, tk, block_q, block_k, 3)


@pytest.mark.parametrize(("n", "block_q", "block_k", "d", "run"), forms())
def test_block_sparse(n: int, block_q: int, block_k: int, d: int, run: Run) -> None:
    """Law 5 for the output, and for the gradients against those of the reference in the same type."""
    leaves, index = case(block_q, block_k, d, run.dtype)
    tq, tk = leaves[0].shape[2], leaves[1].shape[2]
    mask, softmax = index.to_mask(tq, tk), Softmax(d**-0.5)
    weight = torch.randn(1, 4, tq, d, generator=torch.Generator().manual_seed(1))
    seen = mask.repeat_interleave(2, 1).any(-1)

    def by_triton(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        return block_sparse(q, KV(k, v), run.to(index), softmax, impl="triton")

    def by_reference(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        return block_sparse(q, KV(k, v), index, softmax, impl="reference")

    def by_oracle(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        return oracle(q, k, v, mask, scale=softmax.scale)

    with launch.configuration(n), forms_of_a_gpu(run.dtype):
        got = by_triton(*map(run.to, leaves))
        mine = _gradients(by_triton, [run.to(x) for x in leaves], run.to(weight), run.to(seen))
    assert_law_5(got, by_reference(*leaves), by_oracle(*leaves))
    exact = _gradients(by_oracle, [x.double() for x in leaves], weight.double(), seen)
    same = _gradients(by_reference, leaves, weight, seen)
    for a, r, t in zip(mine, same, exact, strict=True):
        allowed = 2 * (r - t).abs().max() + 2 * torch.finfo(run.dtype).eps * (1 + t.abs().max())
        assert (a.cpu() - t).abs().max() <= allowed


@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("d", [16, 136])
def test_flash_and_the_decode_kernels(n: int, d: int) -> None:
    q, k, v = make_qkv(1, 4, 2, 70, 200, d, dtype=torch.float16)
    kv, softmax = KV(k, v), Softmax(d**-0.5)
    truth = oracle(q, k, v, brute_mask(70, 200, [0], window=90), scale=softmax.scale)
    with launch.configuration(n):
        got = flash(q, kv, softmax, window=90, impl="triton")
    assert_law_5(got, flash(q, kv, softmax, window=90, impl="reference"), truth)
    new, index = q[:, :, -1:], TokenIndex(tokens=torch.arange(0, 200, 3).expand(1, 2, 1, -1))
    with launch.configuration(n):
        one, some = (
            decode(new, kv, softmax, impl="triton"),
            gather_decode(new, kv, index, softmax, impl="triton"),
        )
    truth = oracle(new, k, v, brute_mask(1, 200, [0]), scale=softmax.scale)
    assert_law_5(one, decode(new, kv, softmax, impl="reference"), truth)
    mask = torch.zeros(1, 1, 1, 200, dtype=torch.bool)
    mask[..., ::3] = True
    want = gather_decode(new, kv, index, softmax, impl="reference")
    assert_law_5(some, want, oracle(new, k, v, mask, scale=softmax.scale))


def test_a_forced_configuration_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, index = case(16, 16, 16, torch.float16)
    kernel, taken = triton._run_forward(torch.float16, 16, 16), []
    run = kernel.kernel.run
    monkeypatch.setattr(
        kernel.kernel,
        "run",
        lambda *args, **options: (taken.append(options["num_stages"]), run(*args, **options)),
    )
    count = len(kernel.configs)
    for n in (0, 1, 2, count):
        with launch.configuration(n):
            block_sparse(leaves[0], KV(*leaves[1:]), index, Softmax(0.25), impl="triton")
    block_sparse(leaves[0], KV(*leaves[1:]), index, Softmax(0.25), impl="triton")
    assert taken == [kernel.configs[n].num_stages for n in (0, 1, 2, 0, 0)]


def test_no_configuration_that_spills() -> None:
    """Under triton 3.6 the tile of 128 keys with three stages spills 120 to 240 bytes at key blocks of 64."""
    for block_k in (16, 64):
        for config in triton._run_forward(torch.float16, 128, block_k).configs:
            assert config.kwargs["BLOCK_N"] < 128
    whole = triton._run_forward(torch.float16, 128, 128).configs
    assert (128, 64, 4) in [(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_stages) for c in whole]
    assert (128, 128, 2) in [(c.kwargs["BLOCK_M"], c.kwargs["BLOCK_N"], c.num_stages) for c in whole]
