"""A decode step, selection included, waits for nothing and can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.kv import KV
from farspan.attention.ops.decode import decode
from farspan.attention.ops.gather_decode import gather_decode
from farspan.attention.ops.scores import scores
from farspan.attention.ops.select import top_k
from farspan.attention.partial import Partial
from farspan.attention.selection import TokenIndex
from farspan.attention.softmax import Softmax

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="these tests capture CUDA graphs; there is no CUDA device"
    ),
]
B, H, HKV, TK, D, SCALE = 2, 8, 2, 4096, 128, 0.09


def fill(*tensors: Tensor, seed: int) -> None:
    """New numbers in the same places."""
    generator = torch.Generator().manual_seed(seed)
    for x in tensors:
        x.copy_(torch.randn(x.shape, generator=generator).to(x.dtype))


def inputs(tq: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, and k and v as views of a buffer with room to grow."""
    q = torch.empty(B, H, tq, D, dtype=torch.float16, device="cuda")
    k, v = (torch.full((B, HKV, TK + 64, D), torch.nan, dtype=q.dtype, device="cuda") for _ in range(2))
    k, v = k[:, :, :TK], v[:, :, :TK]
    fill(q, k, v, seed=0)
    return q, k, v


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Whoever makes the host wait for the device inside raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of ``step`` and the results that a replay overwrites."""
    step()  # compiles the kernels
    torch.cuda.synchronize()
    with nothing_waits():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_close(got: Partial, want: Partial) -> None:
    assert (got.out.float() - want.out.float()).abs().max() <= 5e-3  # float16, values of about 1
    assert (got.lse - want.lse).abs().max() <= 1e-2


@pytest.mark.parametrize("tq", [1, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_decode(tq: int, padded: bool) -> None:
    q, k, v = inputs(tq)
    start = torch.tensor([0, 100], device="cuda") if padded else None

    def step(impl: str = "triton") -> Partial:
        return decode(q, KV(k, v), Softmax(SCALE), start=start, impl=impl)

    graph, result = captured(step)
    for seed in (1, 2):
        fill(q, k, v, seed=seed)
        if start is not None:
            start.copy_(torch.tensor([seed, 3000 + seed]))
        graph.replay()
        plain = step()
        assert torch.equal(result.out, plain.out) and torch.equal(result.lse, plain.lse)
        assert_close(result, step("eager"))


@pytest.mark.parametrize("tq", [1, 5])
def test_gather_decode_with_its_selection(tq: int) -> None:
    q, k, v = inputs(tq)

    def step() -> tuple[Partial, Tensor, Tensor]:
        logits = scores(q, k, Softmax(SCALE), impl="triton")  # [B, Hkv, G, Tq, Tk]
        ranked = torch.softmax(logits, -1).sum(2)
        tokens = top_k(ranked, 512, impl="triton")
        part = gather_decode(
            q, KV(k, v), TokenIndex(tokens=tokens), Softmax(SCALE), check=False, impl="triton"
        )
        return part, tokens, ranked

    graph, (result, tokens, ranked) = captured(step)
    for seed in (1, 2):
        fill(q, k, v, seed=seed)
        graph.replay()
        plain, same, _ = step()
        assert torch.equal(tokens, same)
        assert torch.equal(result.out, plain.out) and torch.equal(result.lse, plain.lse)
        assert torch.equal(tokens, top_k(ranked, 512, impl="eager"))
        assert_close(
            result, gather_decode(q, KV(k, v), TokenIndex(tokens=tokens), Softmax(SCALE), impl="eager")
        )


def test_ragged_counts_stay_on_the_device() -> None:
    q, k, v = inputs(1)
    tokens = torch.arange(0, 3000, 10, device="cuda").expand(B, HKV, 1, 300)
    counts = torch.tensor([[300, 0], [1, 150]], dtype=torch.int32, device="cuda")[..., None]
    index = TokenIndex(tokens=tokens, counts=counts)

    def step(impl: str = "triton") -> Partial:
        return gather_decode(q, KV(k, v), index, Softmax(SCALE), check=False, impl=impl)

    graph, result = captured(step)
    counts.copy_(torch.tensor([[7, 299], [0, 300]], dtype=torch.int32)[..., None])
    graph.replay()
    plain, eager = step(), step("eager")
    assert torch.equal(result.out, plain.out) and torch.equal(result.lse, plain.lse)
    empty = counts[:, :, 0].repeat_interleave(H // HKV, 1) == 0
    assert bool((result.lse[empty] == -torch.inf).all()) and bool((result.out[empty] == 0).all())
    assert_close(
        Partial(result.out[~empty], result.lse[~empty]), Partial(eager.out[~empty], eager.lse[~empty])
    )
