"""Every prefill mechanism gives what one device gives, and sends what its formula says."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from farspan.attention.softmax import Softmax
from farspan.parallel.mechanisms import blockwise as blockwise_module
from farspan.parallel.mechanisms.blockwise import blockwise
from farspan.parallel.mechanisms.layout import Span
from farspan.parallel.mechanisms.ulysses import unsupported

from ..ops.tools import assert_grads_equal, oracle
from . import jobs_mechanisms as jobs
from .jobs_mechanisms import Case
from .world import World

CASES = [
    Case(new=5),
    Case(new=3, past=1, heads=(8, 8)),  # fewer tokens than ranks: some compute split padding only
    Case(new=61, heads=(6, 3), dims=(8, 4)),
    Case(new=257, heads=(4, 1), softcap=3.0),
    Case(new=500, heads=(8, 8)),
    Case(new=61, past=257, starts=(0, 270, 31)),
    Case(new=5, past=61, heads=(4, 1), starts=(7, 7), softcap=3.0),
    Case(new=257, past=61, heads=(6, 3), starts=(0, 300, 5)),
]


def with_mechanisms(cases: list[Case], size: int) -> list[tuple[str, Case]]:
    """Every mechanism on every case that it serves."""
    served = [(name, case) for name in ("ring", "pass_q") for case in cases]
    served += [("ulysses", case) for case in cases if not unsupported(*case.heads, size)]
    return served + [("usp", c) for u, _ in jobs.grid(size) for c in cases if not unsupported(*c.heads, u)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_prefill_equals_one_device(world: World, size: int):
    world.run(jobs.prefill, size, with_mechanisms(CASES, size))


@pytest.mark.parametrize("size", [2, 4])
def test_in_bf16_within_its_roundings(world: World, size: int):
    cases = [
        Case(new=500, dims=(64, 64)),
        Case(new=257, past=257, heads=(4, 1), starts=(0, 300)),
        Case(new=61, past=5, heads=(8, 8), softcap=3.0),
    ]
    cases = [replace(case, dtype=torch.bfloat16) for case in cases]
    world.run(jobs.prefill, size, with_mechanisms(cases, size))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_sent(world: World, size: int):
    """The formulas of the mechanisms, in whole numbers, on the padded length."""
    p, cases = size, with_mechanisms([Case(new=61, heads=(12, 4)), Case(new=61, past=61)], size)
    for rank, results in enumerate(world.run(jobs.bytes_sent, size, cases)):
        for (name, case), got in zip(cases, results, strict=True):
            (h, hkv), (d, _), e = case.heads, case.dims, 8
            past, rows = got.pop("past"), got.pop("rows")
            s = rows * p
            if name == "ring":
                others = [rows + past[r] for r in range(p) if r != (rank + 1) % p]
                if not case.past:
                    assert sum(others) == (p - 1) * s // p
                forward = sum(others) * 2 * hkv * d * e
                shares = [rows + past[r] for r in range(p) if r != rank]
                assert got == {"ring": forward, "ring_backward": forward + sum(shares) * 2 * hkv * d * 8}
            elif name == "pass_q":
                assert got["pass_q"] == (p - 1) * s * h * (d * (e + e) + 8) // p  # lse in float64 here
            elif name == "ulysses":
                new, head = (
                    (p - 1) * s * (2 * h + 2 * max(hkv, p)) * d * e // p**2,
                    2 * max(hkv, p) * d * e // p,
                )
                assert got["ulysses"] == new + (p - 1) * past[rank] * head
                assert got["ulysses_backward"] == new + (sum(past) - past[rank]) * head
            elif not case.past:
                u, r = jobs.grid(size)[0]
                assert got["ulysses"] == (u - 1) * s * (2 * h + 2 * max(hkv, u)) * d * e // (u**2 * r)
                assert got["ring"] == (r - 1) * s * 2 * -(-hkv // u) * d * e // r


def test_bytes_of_pass_q_in_bf16(world: World):
    """d (e + e_o) + 4 bytes a row and head, in the dtype of q."""
    case = Case(new=61, past=61, dtype=torch.bfloat16)
    for (got,) in world.run(jobs.bytes_sent, 3, [("pass_q", case)]):
        assert got["pass_q"] == 2 * got["rows"] * 8 * (8 * (2 + 2) + 4)


@pytest.mark.parametrize("size", [1, 3])
def test_the_ring_sends_while_it_computes(world: World, size: int):
    """The next block is on its way before this one is computed, and nothing travels in the last step."""
    forward = ["send", "compute", "wait"] * (size - 1) + ["compute"]
    for events in world.run(jobs.schedule, size):
        cut = events.index("backward")
        assert events[:cut] == forward
        backward = events[cut + 1 :]
        assert backward.count("compute") == size and backward.count("send") == 2 * (size - 1)
        assert backward[:2] == (["send", "compute"] if size > 1 else ["compute"])


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("size", [2, 4])
def test_deepspeed_and_an_empty_past_change_nothing(world: World, size: int):
    world.run(jobs.same, size, [Case(new=61), Case(new=5, past=61, heads=(4, 1), dims=(8, 4), starts=(0, 9))])


def test_refusals(world: World):
    world.run(jobs.refusals, 2)


SPANS: list[tuple[list[Span], list[Span]]] = [
    ([(0, 9)], [(0, 9)]),
    ([(3, 7), (20, 31)], [(0, 5), (6, 22), (40, 50)]),
    ([(4, 8), (8, 12), (30, 31)], [(0, 2), (9, 11)]),
    ([(0, 4), (5, 6)], [(6, 9)]),  # nobody sees anything
    ([(0, 40)], [(1, 2), (7, 8), (39, 40)]),
]


@pytest.mark.parametrize("starts", [None, [3], [0, 8, 21]])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("queries", "keys"), SPANS)
def test_spans_by_position(
    monkeypatch: pytest.MonkeyPatch,
    queries: list[Span],
    keys: list[Span],
    softcap: float | None,
    starts: list[int] | None,
):
    """Out, lse and their gradients against a mask of positions; the backward in small tiles."""
    monkeypatch.setattr(blockwise_module, "_ROWS", 4)
    monkeypatch.setattr(blockwise_module, "_COLS", 6)
    rows, cols = (torch.cat([torch.arange(a, b) for a, b in spans]) for spans in (queries, keys))
    g, b = torch.Generator().manual_seed(0), len(starts or [0])
    shapes = [(4, len(rows), 8), (2, len(cols), 8), (2, len(cols), 4)]
    q, k, v = (torch.randn(b, *s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes)
    first = torch.tensor(starts or [0])[:, None, None, None]
    mask = (cols <= rows[:, None]) & (cols >= first)
    how = {"scale": 0.7, "softcap": softcap}
    got = blockwise(q, queries, k, v, keys, starts=starts, softmax=Softmax(**how))
    want = oracle(q, k, v, mask, **how)
    jobs.assert_same(got, want, (queries, keys))
    weights = torch.randn(want.out.shape, generator=g, dtype=torch.float64)
    grads = [torch.autograd.grad(jobs.loss(part, weights), (q, k, v)) for part in (got, want)]
    assert_grads_equal(*grads)
