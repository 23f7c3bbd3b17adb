"""SnapKV and H2O against their definitions, written apart (naive_evicting.py), step by step, on random
queries and keys and on those of SmolLM2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan.attention.kv import KV
from farspan.attention.method import AttentionMethod
from farspan.attention.softmax import Softmax

from . import naive
from .naive_evicting import H2ORow, SnapKVRow
from .test_definitions import SCALE, G, reads
from .tools import HKV, Data, H, Stream, recorded

SNAPKV = [
    {"k": 16, "window": 4},
    {"k": 9, "window": 8, "kernel": 3, "pool": "max"},
    {"k": 30, "window": 29, "kernel": 1},
    {"k": 24, "window": 18, "kernel": 9, "pool": "max"},
]
H2O: list[dict[str, Any]] = [{"k": 16}, {"k": 9}, {"k": 2}, {"k": 3}]
STEPS = 20  # of decoding after each turn; after the last one twice as many
METHODS = [("snapkv", s) for s in SNAPKV] + [("h2o", s) for s in H2O]


def made(name: str, settings: dict[str, Any], scale: float) -> tuple[AttentionMethod, Any]:
    """(method, a maker of the definition of one row and KV head)."""
    method = farspan.methods()[name](**settings)
    if name == "h2o":
        return method, lambda: H2ORow(method.k, scale)
    return method, lambda: SnapKVRow(method.k, method.window, method.kernel, method.pool, scale)


@pytest.mark.parametrize(("name", "settings"), METHODS, ids=str)
@pytest.mark.parametrize(
    ("turns", "starts"),
    [
        ([[60]], None),
        ([[60]], [0, 20, 47, 58]),
        ([[10]], None),  # a prompt that is shorter than most budgets
        ([[18]], [0, 3, 17]),
        ([[1]], None),
        ([[20, 38, 60]], None),  # in chunks, the last of which is shorter than a window
        ([[30, 49, 66]], [0, 35, 51]),
        ([[40], [90, 107]], None),  # and a further prompt
        ([[24], [65]], [0, 9, 21]),
    ],
)
def test_step_by_step(name: str, settings: dict[str, Any], turns: list[list[int]], starts: Any) -> None:
    data = Data.random(turns[-1][-1] + 2 * STEPS, starts, seed=3)
    assert_step_by_step(name, settings, data, turns)


@pytest.mark.parametrize(("name", "settings"), METHODS, ids=str)
def test_step_by_step_on_smollm2(name: str, settings: dict[str, Any], smollm2_layers: list[Data]) -> None:
    for data in smollm2_layers:
        assert_step_by_step(name, settings, data, [[100], [170, 300]])


def assert_step_by_step(name: str, settings: dict[str, Any], data: Data, turns: list[list[int]]) -> None:
    """Each turn is a prompt, whole or in chunks, and steps after it, a crop among those of the last."""
    method, row = made(name, settings, data.scale)
    firsts, heads, kv_heads = data.starts or [0], data.q.shape[1], data.k.shape[1]
    group = heads // kv_heads
    rows = [[row() for _ in range(kv_heads)] for _ in firsts]
    stream = Stream(method, data)
    evicted = 0

    def of(b: int, head: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [G, n, D] and keys [n, D] of a row up to position n."""
        first = firsts[b]
        return data.q[b, head * group : head * group + group, first:n], data.k[b, head, first:n]

    for turn in turns:
        begin = stream.length
        for cut in turn:
            stream.call(cut)
        prompt = turn[-1]
        for b, first in enumerate(firsts):
            for head in range(kv_heads):
                since = max(begin - first, 0) if name == "h2o" else prompt - max(begin, first)
                rows[b][head].prefilled(*of(b, head, prompt), since)
        until = prompt + (STEPS if turn is not turns[-1] else 2 * STEPS)
        for n in range(prompt + 1, until + 1):
            if n == prompt + STEPS:
                stream.state.clear()  # what KVStore.crop does to a method's state
                for per_head in rows:
                    for one in per_head:
                        one.cropped()
            with recorded(method) as seen:
                part = stream.call(n)
            for b, first in enumerate(firsts):
                got = reads(seen[0], b, first, heads)[0]
                for head in range(kv_heads):
                    queries, keys = of(b, head, n)
                    want = rows[b][head].step(queries, keys)
                    evicted += n - first - len(want)
                    for h in range(head * group, head * group + group):
                        assert got[h] == want, f"turn of {turn}, step {n - prompt}, row {b}, head {h}"
                        value = data.v[b, head, first:n]
                        out = naive.attention(data.q[b, h, n - 1], keys, value, want, data.scale)
                        assert (part.out[b, h, 0] - out).abs().max() < 1e-12
    assert evicted > 0 or turns[-1][-1] < method.k  # type: ignore[attr-defined]


def test_an_evicted_key_is_never_named_again() -> None:
    for name, settings in METHODS:
        method, _ = made(name, settings, SCALE)
        stream = Stream(method, Data.random(120, [0, 11]))
        stream.call(60)
        gone = torch.zeros(2, H, 120, dtype=torch.bool)
        for n in range(61, 121):
            with recorded(method) as seen:
                stream.call(n)
            read = seen[0].mask()[:, :, 0].repeat_interleave(G, 1)
            assert not bool((read & gone[..., :n]).any())
            gone[..., :n] |= ~read
        assert bool(gone.any())


def test_ties_go_to_the_lowest_position() -> None:
    """All keys alike: of equals the first ones stay."""
    n = 60
    same, values = torch.ones(1, H, n, 16).double(), torch.randn(1, HKV, n, 16).double()
    data = Data(same, same[:, :HKV], values)
    snap = farspan.methods()["snapkv"](k=14, window=4, kernel=1)
    heavy = farspan.methods()["h2o"](k=12)
    for method, want in ((snap, [*range(10), *range(53, 60)]), (heavy, [*range(6), *range(54, 60)])):
        stream = Stream(method, data)
        stream.call(57)
        stream.call(58)
        stream.call(59)
        with recorded(method) as seen:
            stream.call(60)
        for head in seen[0].mask()[0, :, 0]:
            assert head.nonzero()[:, 0].tolist() == want, method.name


def test_a_soft_cap_bends_the_attention_that_is_counted() -> None:
    """The scores are of the model's own attention, whose logits may be capped."""
    from farspan.attention.keys import Keys
    from farspan.attention.received import attention_received

    data = Data.random(50, [0, 13])
    keys = Keys(kv=KV(data.k, data.v), tq=30, softmax=Softmax(SCALE, 2.0), start=torch.tensor([0, 13]))
    got = attention_received(data.q[:, :, 20:], keys, 50).sum(2)
    for b, first in enumerate((0, 13)):
        want = torch.zeros(HKV, 50, dtype=torch.float64)
        for i in range(20, 50):
            for h in range(H):
                logits = data.k[b, h // G, first : i + 1] @ data.q[b, h, i] * SCALE
                want[h // G, first : i + 1] += torch.softmax(2 * torch.tanh(logits / 2), 0)
        assert (got[b] - want).abs().max() < 1e-12
