"""Each method against its definition, written apart (naive.py): the sets it reads, and what comes out, on
random queries and keys and on those of SmolLM2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan.attention.method import AttentionMethod, LayerInfo

from . import naive
from .tools import HKV, D, Data, H, Selection, Stream, layer_info, recorded

G, SCALE = H // HKV, D**-0.5


def grouped(q: torch.Tensor, kv_heads: int = HKV) -> torch.Tensor:
    """[H, ...] -> [Hkv, G, ...]"""
    return q.unflatten(0, (kv_heads, -1))


def reads(selection: Selection, b: int, first: int, heads: int = H) -> list[list[set[int]]]:
    """[query][query head] -> positions read by row b, counted from its first."""
    mask = selection.mask()[b if selection.batch > 1 else 0]
    mask = mask.repeat_interleave(heads // mask.shape[0], 0)
    return [
        [{i - first for i in row.nonzero()[:, 0].tolist()} for row in mask[:, t]]
        for t in range(mask.shape[1])
    ]


# --- Recycled ---------------------------------------------------------------------------------------

STEPS = 40
RECYCLED = [
    {"k": 16, "stride": 7},
    {"k": 16, "stride": 1},
    {"k": 9, "stride": 6, "pool": 5},
    {"k": 5, "stride": 12, "gqa_reduce": "max"},  # every key is replaced, then the oldest newcomer
    {"k": 16, "dynamic": True, "qc": 3, "s": 0.3},
    {"k": 16, "dynamic": True, "qc": 2, "s": 0.4, "scope": "kv_head", "gqa_reduce": "max"},
    {"k": 6, "dynamic": True, "qc": 5, "s": -1.0},  # never below: never full again
]


@pytest.mark.parametrize("settings", RECYCLED, ids=str)
@pytest.mark.parametrize(
    ("prompt", "starts"), [(60, None), (60, [0, 20, 47, 58]), (10, None), (18, [0, 3, 17]), (1, [0])]
)
def test_recycled_step_by_step(settings: dict[str, Any], prompt: int, starts: list[int] | None) -> None:
    """Rows that are longer than k, reach it on the way, or never do."""
    assert_recycled(settings, Data.random(prompt + STEPS, starts, seed=3), prompt)


@pytest.mark.parametrize("settings", RECYCLED, ids=str)
def test_recycled_on_smollm2(settings: dict[str, Any], smollm2_layers: list[Data]) -> None:
    for data in smollm2_layers:
        assert_recycled(settings, data, 300)


def assert_recycled(settings: dict[str, Any], data: Data, prompt: int) -> None:
    """STEPS steps, one crop among them."""
    method: Any = farspan.methods()["recycled"](**settings)
    crop_at = 25
    firsts, heads, kv_heads = data.starts or [0], data.q.shape[1], data.k.shape[1]
    known = {
        f: getattr(method, f) for f in ("k", "stride", "dynamic", "qc", "s", "gqa_reduce", "scope", "pool")
    }
    rows = [naive.RecycledRow(**known, scale=data.scale, heads=kv_heads) for _ in firsts]
    stream = Stream(method, data)
    stream.call(prompt)
    for b, first in enumerate(firsts):
        rows[b].prefilled(grouped(data.q[b, :, prompt - 1], kv_heads), data.k[b, :, first:prompt])
    kinds = {"full": 0, "recycled": 0}
    for n in range(prompt + 1, prompt + STEPS + 1):
        if n == prompt + crop_at:
            stream.state.clear()  # what KVStore.crop does to a method's state
            for row in rows:
                row.cropped()
        with recorded(method) as seen:
            part = stream.call(n)
        for b, first in enumerate(firsts):
            q, k, v = data.q[b, :, n - 1], data.k[b, :, first:n], data.v[b, :, first:n]
            want = rows[b].step(grouped(q, kv_heads), k)
            got = reads(seen[0], b, first, heads)[0]
            for h in range(heads):
                head = h * kv_heads // heads
                assert got[h] == want[head], f"step {n - prompt}, row {b}, head {h}"
                out = naive.attention(q[h], k[head], v[head], want[head], data.scale)
                assert (part.out[b, h, 0] - out).abs().max() < 1e-12
            if n - first > method.k:
                kinds["full" if len(want[0]) == n - first else "recycled"] += 1
    assert kinds["full"] > 0
    assert kinds["recycled"] > 0 or method.stride == 1


# --- decode methods without state -------------------------------------------------------------------


def _size(method: AttentionMethod, n: int) -> int:
    return method.k if method.k is not None else max(1, round(method.fraction * n))  # type: ignore[attr-defined]


@pytest.mark.parametrize("gqa_reduce", ["sum", "max", "none"])
@pytest.mark.parametrize("budget", [{"k": 24}, {"k": 3}, {"k": 35}, {"k": None, "fraction": 0.35}], ids=str)
@pytest.mark.parametrize("name", ["quest", "double_sparsity"])
@pytest.mark.parametrize("starts", [None, [0, 30, 57]])
def test_decode_selection(
    name: str, gqa_reduce: str, budget: dict[str, Any], starts: list[int] | None
) -> None:
    assert_decode_selection({"gqa_reduce": gqa_reduce, **budget}, name, Data.random(69, starts))


@pytest.mark.parametrize("settings", [{"k": 40, "gqa_reduce": "max"}, {"k": None, "fraction": 0.2}], ids=str)
@pytest.mark.parametrize("name", ["quest", "double_sparsity"])
def test_decode_selection_on_smollm2(name: str, settings: dict[str, Any], smollm2_layers: list[Data]) -> None:
    for data in smollm2_layers:
        assert_decode_selection(settings, name, data)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("starts", [None, [0, 30, 57]])
def test_double_sparsity_with_rounded_labels(bits: int, starts: list[int] | None) -> None:
    assert_decode_selection({"label_bits": bits, "k": 20}, "double_sparsity", Data.random(69, starts))


def assert_decode_selection(settings: dict[str, Any], name: str, data: Data) -> None:
    """Of 9 steps, the last of the data."""
    heads, kv_heads, d = data.q.shape[1], data.k.shape[1], data.k.shape[3]
    generator = torch.Generator().manual_seed(0)
    ranking = torch.stack([torch.randperm(d, generator=generator) for _ in range(kv_heads)]).int()
    own = {"page": 8} if name == "quest" else {"group_factor": 4}
    settings = {"dense_layers": 0, **settings, **own}
    info = LayerInfo(0, heads, kv_heads, d, weights={"channels": ranking})
    method: Any = farspan.methods()[name](**settings).for_layer(info)
    total = data.k.shape[2]
    stream = Stream(method, data)
    stream.call(total - 9)
    for n in range(total - 8, total + 1):
        with recorded(method) as seen:
            part = stream.call(n)
        for b, first in enumerate(data.starts or [0]):
            got = reads(seen[0], b, first, heads)[0]
            for head in range(kv_heads):
                q, k = grouped(data.q[b, :, n - 1], kv_heads)[head], data.k[b, head, first:n]
                how = {"size": _size(method, n - first), "gqa_reduce": method.gqa_reduce, "scale": data.scale}
                if name == "quest":
                    want = naive.quest(q, k, page=8, **how)
                else:
                    how["bits"] = method.label_bits
                    want = naive.double_sparsity(q, k, ranking[head, : d // 4].tolist(), **how)
                for g in range(len(q)):
                    h = head * len(q) + g
                    assert got[h] == want[g], f"{n - first} keys, row {b}, head {h}"
                    out = naive.attention(q[g], k, data.v[b, head, first:n], want[g], data.scale)
                    assert (part.out[b, h, 0] - out).abs().max() < 1e-12


def test_double_sparsity_reads_the_first_ranked_channels() -> None:
    """group_factor 4 of 16 channels keeps 4, per KV head; the order within them does not matter. Without one
    it keeps 32, or all where there are fewer."""
    ranking = torch.stack([torch.arange(D), torch.arange(D).flip(0)]).int()
    method = farspan.methods()["double_sparsity"](dense_layers=0, group_factor=4)
    served = method.for_layer(layer_info({"channels": ranking}))
    assert served.labels.channels.tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]  # type: ignore[union-attr]
    for size, kept in ((16, 16), (64, 32), (256, 32)):
        info = LayerInfo(0, 2, 1, size, weights={"channels": torch.arange(size)[None].int()})
        served = farspan.methods()["double_sparsity"](dense_layers=0).for_layer(info)
        assert served.labels.channels.tolist() == [[*range(kept)]]  # type: ignore[union-attr]


# --- prefill ----------------------------------------------------------------------------------------

BLOCKS = [
    {"k": 48, "block": 16},
    {"k": 32, "block": 16, "gqa_reduce": "max"},
    {"k": 1, "block": 16},
    {"k": 40, "block": 8, "gqa_reduce": "none"},
    {"k": None, "fraction": 0.5, "block": 8},
    {"k": None, "fraction": 0.01, "block": 16, "gqa_reduce": "none"},
]


@pytest.mark.parametrize("settings", BLOCKS, ids=str)
@pytest.mark.parametrize("cuts", [[150], [64, 150], [37, 90, 150]], ids=["whole", "aligned", "unaligned"])
@pytest.mark.parametrize("starts", [None, [0, 21, 120]])
def test_block_topk_selection(settings: dict[str, Any], cuts: list[int], starts: list[int] | None) -> None:
    assert_block_topk(settings, Data.random(150, starts), cuts)


@pytest.mark.parametrize("settings", BLOCKS, ids=str)
def test_block_topk_selection_on_smollm2(settings: dict[str, Any], smollm2_layers: list[Data]) -> None:
    for data in smollm2_layers:
        assert_block_topk(settings, data, [200, 512])


def assert_block_topk(settings: dict[str, Any], data: Data, cuts: list[int]) -> None:
    method: Any = farspan.methods()["block_topk"](**settings)
    heads, kv_heads = data.q.shape[1], data.k.shape[1]
    stream = Stream(method, data)
    for a, z in zip([0, *cuts], cuts, strict=False):
        with recorded(method) as seen:
            stream.call(z)
        rows = [(b, first) for b, first in enumerate(data.starts or [0]) if first < z]
        if not data.starts:
            assert len(seen) == 1
        for (b, first), selection in zip(rows, seen, strict=True):
            begin = max(a, first)
            if selection.index is None:
                continue  # the budget covers the length: law 1 and law 3 are about that
            for head in range(kv_heads):
                want = naive.block_topk(
                    grouped(data.q[b, :, begin:z], kv_heads)[head],
                    data.k[b, head, first:z],
                    past=begin - first,
                    block=method.block,
                    k_tokens=method.k,
                    fraction=method.fraction,
                    gqa_reduce=method.gqa_reduce,
                    scale=data.scale,
                )
                index, shared = selection.index, heads // selection.index.blocks.shape[1]
                assert index.blocks.shape[2] == len(want)
                for n, per_head in enumerate(want):
                    for g in range(heads // kv_heads):
                        h = (head * (heads // kv_heads) + g) // shared
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
        assert seen[0].mask()[0, :, 0].nonzero()[:, 1].view(-1, len(want)).tolist() == [want] * HKV, name
    block = farspan.methods()["block_topk"](k=24, block=8)
    with recorded(block) as seen:
        Stream(block, data).call(n)
    index = seen[0].index
    assert [index.blocks[0, 0, i, : int(index.counts[0, 0, i])].tolist() for i in (0, 1, 2, 7)] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 7],
    ]  # fmt: skip
