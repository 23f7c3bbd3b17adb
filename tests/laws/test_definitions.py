"""Each method against its definition, written apart (naive.py): the sets it reads, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan.attention.index import BlockIndex, TokenIndex
from farspan.attention.method import AttentionMethod

from . import naive
from .tools import HKV, D, Data, H, Selection, Stream, layer_info, recorded

G, SCALE = H // HKV, D**-0.5


def grouped(q: torch.Tensor) -> torch.Tensor:
    """[H, ...] -> [Hkv, G, ...]"""
    return q.unflatten(0, (HKV, G))


def reads(selection: Selection, b: int, first: int) -> list[list[set[int]]]:
    """[query][query head] -> positions read by row b, counted from its first."""
    mask = selection.mask()[b if selection.batch > 1 else 0]
    mask = mask.repeat_interleave(H // mask.shape[0], 0)
    return [
        [{i - first for i in row.nonzero()[:, 0].tolist()} for row in mask[:, t]]
        for t in range(mask.shape[1])
    ]


# --- Recycled ---------------------------------------------------------------------------------------

RECYCLED = [
    {"k": 16, "stride": 7},
    {"k": 16, "stride": 1},
    {"k": 9, "stride": 6, "pool": 5},
    {"k": 5, "stride": 12, "share": "max"},  # every key is replaced, then the oldest newcomer
    {"k": 16, "dynamic": True, "qc": 3, "s": 0.3},
    {"k": 16, "dynamic": True, "qc": 2, "s": 0.4, "scope": "kv_head", "share": "max"},
    {"k": 6, "dynamic": True, "qc": 5, "s": -1.0},  # never below: never full again
]


@pytest.mark.parametrize("settings", RECYCLED, ids=str)
@pytest.mark.parametrize(
    ("prompt", "starts"), [(60, None), (60, [0, 20, 47, 58]), (10, None), (18, [0, 3, 17]), (1, [0])]
)
def test_recycled_step_by_step(settings: dict[str, Any], prompt: int, starts: list[int] | None) -> None:
    """40 steps, one crop among them, of rows that are longer than k, reach it on the way, or never do."""
    method = farspan.parse_method("recycled")
    method = type(method)(**settings)
    steps, crop_at = 40, 25
    data = Data.random(prompt + steps, starts, seed=3)
    firsts = starts or [0]
    known = {f: getattr(method, f) for f in ("k", "stride", "dynamic", "qc", "s", "share", "scope", "pool")}
    rows = [naive.RecycledRow(**known, scale=SCALE, heads=HKV) for _ in firsts]
    stream = Stream(method, data)
    stream.call(prompt)
    for b, first in enumerate(firsts):
        rows[b].prefilled(grouped(data.q[b, :, prompt - 1]), data.k[b, :, first:prompt])
    kinds = {"full": 0, "recycled": 0}
    for n in range(prompt + 1, prompt + steps + 1):
        if n == prompt + crop_at:
            stream.state.clear()  # what KVStore.crop does to a method's state
            for row in rows:
                row.cropped()
        with recorded(method) as seen:
            part = stream.call(n)
        for b, first in enumerate(firsts):
            q, k, v = data.q[b, :, n - 1], data.k[b, :, first:n], data.v[b, :, first:n]
            want = rows[b].step(grouped(q), k)
            got = reads(seen[0], b, first)[0]
            for h in range(H):
                assert got[h] == want[h // G], f"step {n - prompt}, row {b}, head {h}"
                out = naive.attention(q[h], k[h // G], v[h // G], want[h // G], SCALE)
                assert (part.out[b, h, 0] - out).abs().max() < 1e-12
            if n - first > method.k:
                kinds["full" if len(want[0]) == n - first else "recycled"] += 1
    assert kinds["full"] > 0
    assert kinds["recycled"] > 0 or method.stride == 1


# --- decode methods without state -------------------------------------------------------------------


def _size(method: AttentionMethod, n: int) -> int:
    return method.k if method.k is not None else max(1, round(method.fraction * n))  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", ["sum", "max", "none"])
@pytest.mark.parametrize("budget", [{"k": 24}, {"k": 3}, {"k": 35}, {"k": None, "fraction": 0.35}], ids=str)
@pytest.mark.parametrize("name", ["quest", "double_sparsity"])
@pytest.mark.parametrize("starts", [None, [0, 30, 57]])
def test_decode_selection(name: str, share: str, budget: dict[str, Any], starts: list[int] | None) -> None:
    cls = farspan.methods()[name]
    generator = torch.Generator().manual_seed(0)
    ranking = torch.stack([torch.randperm(D, generator=generator) for _ in range(HKV)]).int()
    settings = {"share": share, "dense_layers": 0, **budget, **({"page": 8} if name == "quest" else {})}
    method = cls(**settings).for_layer(layer_info({"channels": ranking}))
    assert method is not None
    prompt, steps = 60, 9
    data = Data.random(prompt + steps, starts)
    stream = Stream(method, data)
    stream.call(prompt)
    for n in range(prompt + 1, prompt + steps + 1):
        with recorded(method) as seen:
            part = stream.call(n)
        for b, first in enumerate(starts or [0]):
            got = reads(seen[0], b, first)[0]
            for head in range(HKV):
                q, k = grouped(data.q[b, :, n - 1])[head], data.k[b, head, first:n]
                size = _size(method, n - first)
                if name == "quest":
                    want = naive.quest(q, k, size=size, page=8, share=share, scale=SCALE)
                else:
                    channels = ranking[head, : D // 4].tolist()
                    want = naive.double_sparsity(q, k, channels, size=size, share=share, scale=SCALE)
                for g in range(G):
                    h = head * G + g
                    assert got[h] == want[g], f"{n - first} keys, row {b}, head {h}"
                    out = naive.attention(q[g], k, data.v[b, head, first:n], want[g], SCALE)
                    assert (part.out[b, h, 0] - out).abs().max() < 1e-12


def test_double_sparsity_reads_the_first_ranked_channels() -> None:
    """group_factor 4 of 16 channels keeps 4, per KV head; the order within them does not matter."""
    ranking = torch.stack([torch.arange(D), torch.arange(D).flip(0)]).int()
    method = farspan.methods()["double_sparsity"](dense_layers=0, group_factor=4)
    served = method.for_layer(layer_info({"channels": ranking}))
    assert served.labels.channels.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]  # type: ignore[union-attr]


# --- prefill ----------------------------------------------------------------------------------------

BLOCKS = [
    {"k": 48, "block": 16},
    {"k": 32, "block": 16, "share": "max"},
    {"k": 1, "block": 16},
    {"k": 40, "block": 8, "share": "none"},
    {"k": None, "fraction": 0.5, "block": 8},
    {"k": None, "fraction": 0.01, "block": 16, "share": "none"},
]


@pytest.mark.parametrize("settings", BLOCKS, ids=str)
@pytest.mark.parametrize("cuts", [[150], [64, 150], [37, 90, 150]], ids=["whole", "aligned", "unaligned"])
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
def test_block_topk_selection(settings: dict[str, Any], cuts: list[int], starts: list[int] | None) -> None:
    method = farspan.methods()["block_topk"](**settings)
    data = Data.random(150, starts)
    stream = Stream(method, data)
    for a, z in zip([0, *cuts], cuts, strict=False):
        with recorded(method) as seen:
            stream.call(z)
        rows = [(b, first) for b, first in enumerate(starts or [0]) if first < z]
        if not starts:
            assert len(seen) == 1
        for (b, first), selection in zip(rows, seen, strict=True):
            begin = max(a, first)
            if selection.index is None:
                continue  # the budget covers the length: law 1 and law 3 are about that
            assert isinstance(selection.index, BlockIndex)
            for head in range(HKV):
                want = naive.block_topk(
                    grouped(data.q[b, :, begin:z])[head],
                    data.k[b, head, first:z],
                    past=begin - first,
                    block=method.block,
                    k_tokens=method.k,
                    fraction=method.fraction,
                    share=method.share,
                    scale=SCALE,
                )
                index, shared = selection.index, H // selection.index.blocks.shape[1]
                assert index.blocks.shape[2] == len(want)
                for n, per_head in enumerate(want):
                    for g in range(G):
                        h = (head * G + g) // shared
                        count = int(index.counts[0, h, n])
                        got = index.blocks[0, h, n, :count].tolist()
                        assert got == sorted(per_head[g]), f"row {b}, head {h}, query block {n}"


@pytest.mark.parametrize("settings", BLOCKS, ids=str)
@pytest.mark.parametrize("cuts", [[150], [37, 90, 150], [61, 150]])
def test_block_topk_reads_the_first_and_the_own_block(settings: dict[str, Any], cuts: list[int]) -> None:
    method = farspan.methods()["block_topk"](**settings)
    stream = Stream(method, Data.random(150))
    for a, z in zip([0, *cuts], cuts, strict=False):
        with recorded(method) as seen:
            stream.call(z)
        mask = seen[0].mask()[0]
        for i, position in enumerate(range(a, z)):
            own = position // method.block * method.block
            assert bool(mask[:, i, own : position + 1].all()), f"query {position} misses its own block"
            assert bool(mask[:, i, : min(method.block, position + 1)].all())


def test_ties_go_to_the_lowest_position() -> None:
    """All keys alike: every method that ranks keys takes the first ones."""
    n = 64
    same, values = torch.ones(1, H, n, D).double(), torch.randn(1, HKV, n, D).double()
    data = Data(same, same[:, :HKV], values)
    ranking = torch.arange(D).repeat(HKV, 1).int()
    cases: list[tuple[str, dict[str, Any], list[int]]] = [
        ("quest", {"k": 16, "page": 8, "dense_layers": 0}, [*range(8), *range(56, 64)]),
        ("double_sparsity", {"k": 10, "dense_layers": 0}, list(range(10))),
        ("recycled", {"k": 10, "stride": 100}, [*range(9), n - 1]),
    ]
    for name, settings, want in cases:
        method = farspan.methods()[name](**settings).for_layer(layer_info({"channels": ranking}))
        assert method is not None
        stream = Stream(method, data)
        stream.call(n - 1)
        with recorded(method) as seen:
            stream.call(n)
        assert isinstance(seen[0].index, TokenIndex)
        assert seen[0].mask()[0, :, 0].nonzero()[:, 1].view(-1, len(want)).tolist() == [want] * HKV, name
    block = farspan.methods()["block_topk"](k=24, block=8)
    with recorded(block) as seen:
        Stream(block, data).call(n)
    index = seen[0].index
    assert isinstance(index, BlockIndex)
    assert [index.blocks[0, 0, i, : int(index.counts[0, 0, i])].tolist() for i in (0, 1, 2, 7)] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 7],
    ]  # fmt: skip
