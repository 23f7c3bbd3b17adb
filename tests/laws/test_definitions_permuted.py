"""PBS-Attn and vertical_slash against their definitions (naive_pbs.py, naive_vertical_slash.py): the keys
that each query reads, on random and peaked queries and keys and on those of a real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import AttentionMethod, LayerInfo
from farspan.attention.selection import BlockIndex
from farspan.attention.softmax import Softmax

from . import naive_pbs, naive_vertical_slash
from .tools import HKV, D, Data, H, assert_same
from .tools import Stream as Calls

SCALE = D**-0.5
CUTS = [[150], [64, 150], [37, 90, 150], [8, 150]]


def asked(method: AttentionMethod, q: Tensor, k: Tensor, scale: float) -> BlockIndex | None:
    """What the method answers a call of queries q [H, Tq, D], the last of keys k [Hkv, n, D]."""
    keys = Keys(kv=KV(k[None], k[None]), tq=q.shape[1], softmax=Softmax(scale))
    keys.prepared = method.prepare_prefill(q[None, :, -method.last_queries :], keys)
    index = method.select_prefill(q[None], keys)
    if index is None:
        return None
    index.check(k.shape[1])
    assert {x.dtype for x in (index.blocks, index.counts, index.key_order)} == {torch.int32}
    return index


def read(index: BlockIndex, h: int, heads: int, n: int) -> list[set[int]]:
    """[query block] the keys that query head h of ``heads`` reads, later ones too."""
    s = h * index.blocks.shape[1] // heads
    assert index.key_order is not None
    order = index.key_order[0, s].tolist()
    return [
        {i for j in blocks[:count] for i in order[j * index.block_k : (j + 1) * index.block_k]}
        for blocks, count in zip(index.blocks[0, s].tolist(), index.counts[0, s].tolist(), strict=True)
    ]


def visible(reads: list[set[int]], past: int, block: int, n: int) -> Iterator[tuple[int, set[int]]]:
    """What each query sees of what its block reads."""
    for position in range(past, n):
        yield position, {i for i in reads[(position - past) // block] if i <= position}


def peaked(data: Data) -> Data:
    """Some keys that many queries look at, and the first one above all."""
    strong = torch.randperm(data.k.shape[2], generator=torch.Generator().manual_seed(1))[:12]
    toward = data.q.mean((2,), keepdim=True).unflatten(1, (HKV, -1)).mean(2)
    data.k[:, :, strong] += 3 * toward
    data.k[:, :, :1] += 5 * toward
    return data


# --- PBS-Attn ---------------------------------------------------------------------------------------

PBS: list[dict[str, Any]] = [
    {"mass": 0.5, "block": 8, "segment": 16},
    {"mass": 0.9, "block": 16, "segment": 32},
    {"mass": 0.02, "block": 8, "segment": 24},
    {"mass": 0.4, "block": 8, "segment": 16, "gqa_reduce": "sum"},
    {"mass": 0.4, "block": 16, "segment": 16, "gqa_reduce": "max"},
    {"mass": 0.5, "block": 8, "segment": 16, "select": "antidiagonal", "stride": 4},
    {"mass": 0.9, "block": 16, "segment": 32, "select": "antidiagonal", "stride": 16, "gqa_reduce": "sum"},
    {"mass": 0.3, "block": 12, "segment": 24, "select": "antidiagonal", "stride": 3, "gqa_reduce": "max"},
]


def agrees_with_pbs(method: AttentionMethod, q: Tensor, k: Tensor, scale: float) -> int:
    """Compare every query's keys; -> how many pairs are left out."""
    names = ("mass", "block", "segment", "select", "stride", "gqa_reduce")
    settings = {name: getattr(method, name) for name in names}
    heads, tq, n = q.shape[0], q.shape[1], k.shape[1]
    index, past, left_out = asked(method, q, k, scale), n - tq, 0
    for kv, group in enumerate(q.unflatten(0, (k.shape[0], -1))):
        want = naive_pbs.pbs(group, k[kv], scale=scale, **settings)
        for g in range(group.shape[0]):
            reads = [w[g] for w in want]
            expected = visible(reads, past, settings["block"], n)
            if index is None:
                assert all(keys == set(range(p + 1)) for p, keys in expected), "not everything is to be read"
                continue
            got = visible(read(index, kv * group.shape[0] + g, heads, n), past, settings["block"], n)
            for (position, keys), (_, keys_wanted) in zip(got, expected, strict=True):
                assert keys == keys_wanted, f"head {g} of group {kv}, query {position}"
                left_out += position + 1 - len(keys)
    return left_out


@pytest.mark.parametrize("settings", PBS, ids=str)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("prepare", [lambda data: data, peaked], ids=["random", "peaked"])
def test_pbs_selection(settings: dict[str, Any], cuts: list[int], prepare: Any) -> None:
    """A prompt whole and in chunks, on and off the grid of segments: each by its own last queries."""
    method, left_out = farspan.methods()["pbs"](**settings), 0
    for seed in range(3):
        data = prepare(Data.random(150, seed=seed))
        for a, z in zip([0, *cuts], cuts, strict=False):
            left_out += agrees_with_pbs(method, data.q[0, :, a:z], data.k[0, :, :z], SCALE)
    assert left_out > 0


def test_pbs_on_smollm2(smollm2_layers: list[Data]) -> None:
    for layer, data in enumerate(smollm2_layers):
        for settings in (
            {"block": 32, "segment": 64},
            {"block": 32, "segment": 128, "mass": 0.6, "gqa_reduce": "sum"},
            {"block": 64, "segment": 64, "mass": 0.7, "select": "antidiagonal", "stride": 16},
        ):
            method = farspan.methods()["pbs"](**settings)
            for past in (0, 200):
                left_out = agrees_with_pbs(method, data.q[0, :, past:], data.k[0], data.scale)
                assert left_out > 0, f"layer {layer}, past {past}"


@pytest.mark.parametrize("cuts", [[150], [37, 150]], ids=str)
def test_pbs_reads_everything_at_mass_1(cuts: list[int]) -> None:
    """By name, and through the selection: the smallest set with nearly all of the mass."""
    data, dense = Data.random(150), farspan.parse_method("dense")
    for mass in ("1", "0.999999999999"):
        method = farspan.parse_method(f"pbs:mass={mass},block=8,segment=16")
        assert_same(Calls(method, data).run(cuts), Calls(dense, data).run(cuts))


def test_pbs_sorts_keys_within_segments_and_leaves_the_last_one() -> None:
    """Keys that the last queries look at come first; all keys alike stay where they are."""
    n = 70
    data = Data.random(n)
    data.k[:, :, 21] = 50 * data.q[:, ::4, -8:].mean(2)
    index = asked(farspan.parse_method("pbs:block=8,segment=16"), data.q[0], data.k[0], SCALE)
    assert index is not None and index.key_order is not None
    order = index.key_order[0]
    for s in range(n // 16):
        inside = order[:, 16 * s : 16 * s + 16].sort(-1).values
        assert torch.equal(inside, torch.arange(16 * s, 16 * s + 16, dtype=torch.int32).expand(H, -1))
    assert bool((order[::4, 16] == 21).all()), "the head whose queries it was made of"
    assert order[:, 64:].tolist() == [list(range(64, n))] * H
    data.k[:] = 1
    index = asked(farspan.parse_method("pbs:block=8,segment=16"), data.q[0], data.k[0], SCALE)
    assert index is not None and index.key_order is not None
    assert index.key_order[0].tolist() == [list(range(n))] * H


# --- vertical-slash ---------------------------------------------------------------------------------

VERTICAL_SLASH: list[dict[str, Any]] = [
    {"vertical": 12, "slash": 10, "block": 8, "last": 16, "sinks": 2, "local": 4},
    {"vertical": 40, "slash": 3, "block": 8, "last": 64, "sinks": 5, "local": 1},
    {"vertical": 1, "slash": 30, "block": 16, "last": 7, "sinks": 0, "local": 6},
    {"vertical": 3, "slash": 5, "block": 16, "last": 16, "sinks": 6, "local": 9},  # fewer than the forced
    {"vertical": 12, "slash": 10, "block": 8, "last": 16, "sinks": 2, "local": 4, "gqa_reduce": "sum"},
    {"vertical": 9, "slash": 4, "block": 16, "last": 16, "sinks": 2, "local": 1, "gqa_reduce": "max"},
    {"mass": 0.4, "block": 8, "last": 16, "sinks": 2, "local": 4},
    {"mass": 0.05, "block": 8, "last": 16, "sinks": 0, "local": 1, "gqa_reduce": "sum"},
]


def agrees_with_vertical_slash(
    method: Any, q: Tensor, k: Tensor, scale: float, budgets: list[tuple[int, int]] | None = None
) -> int:
    """Compare every query's keys; -> how many pairs are left out."""
    names = ("mass", "block", "last", "sinks", "local", "gqa_reduce")
    settings = {name: getattr(method, name) for name in names}
    heads, tq, n = q.shape[0], q.shape[1], k.shape[1]
    index, past, left_out = asked(method, q, k, scale), n - tq, 0
    budgets = budgets or [(method.vertical, method.slash)] * heads
    for kv, group in enumerate(q.unflatten(0, (k.shape[0], -1))):
        size = group.shape[0]
        mine = budgets[kv * size : (kv + 1) * size]
        want = naive_vertical_slash.vertical_slash(group, k[kv], budgets=mine, scale=scale, **settings)
        for g in range(size):
            expected = visible([w[g] for w in want], past, method.block, n)
            if index is None:
                assert all(keys == set(range(p + 1)) for p, keys in expected), "not everything is to be read"
                continue
            got = visible(read(index, kv * size + g, heads, n), past, method.block, n)
            for (position, keys), (_, keys_wanted) in zip(got, expected, strict=True):
                assert keys == keys_wanted, f"head {g} of group {kv}, query {position}"
                left_out += position + 1 - len(keys)
    return left_out


@pytest.mark.parametrize("settings", VERTICAL_SLASH, ids=str)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("prepare", [lambda data: data, peaked], ids=["random", "peaked"])
def test_vertical_slash_selection(settings: dict[str, Any], cuts: list[int], prepare: Any) -> None:
    method, left_out = farspan.methods()["vertical_slash"](**settings), 0
    for seed in range(3):
        data = prepare(Data.random(150, seed=seed))
        for a, z in zip([0, *cuts], cuts, strict=False):
            left_out += agrees_with_vertical_slash(method, data.q[0, :, a:z], data.k[0, :, :z], SCALE)
    assert left_out > 0


def test_vertical_slash_on_smollm2(smollm2_layers: list[Data]) -> None:
    for layer, data in enumerate(smollm2_layers):
        for settings in ({"vertical": 60, "slash": 120}, {"mass": 0.8, "block": 32}):
            method = farspan.methods()["vertical_slash"](**settings)
            for past in (0, 200):
                left_out = agrees_with_vertical_slash(method, data.q[0, :, past:], data.k[0], data.scale)
                assert left_out > 0, f"layer {layer}, past {past}"


@pytest.mark.parametrize("past", [0, 37])
def test_vertical_slash_reads_the_whole_pattern(past: int) -> None:
    """Blocks may add keys at their rims, and take none away; a block of one key adds only those of the
    band."""
    n = 150
    data = peaked(Data.random(n))
    for block in (1, 8):
        settings = {"vertical": 12, "slash": 10, "last": 16, "sinks": 2, "local": 4, "block": block}
        index = asked(farspan.methods()["vertical_slash"](**settings), data.q[0, :, past:], data.k[0], SCALE)
        assert index is not None
        for h in range(H):
            q, k = data.q[0, h, past:], data.k[0, h * HKV // H]
            columns, diagonals = naive_vertical_slash.columns_and_diagonals(q, k, 16, SCALE)
            picked = (
                naive_vertical_slash.chosen(columns, 12, None, 2),
                naive_vertical_slash.chosen(diagonals, 10, None, 4),
            )
            for position, keys in visible(read(index, h, H, n), past, block, n):
                pattern = naive_vertical_slash.exact_pattern(position, *picked)
                assert keys >= pattern
                assert block > 1 or len(keys) - len(pattern) <= 1, "the latest key of no column"


def test_vertical_slash_with_the_budgets_of_a_file(tmp_path: Path) -> None:
    """MInference's format; a head that is not in it gets the general budgets, as there."""
    layers = [
        {"0": ["vertical_and_slash", 1, 1, 1.0]},
        {str(h): ["vertical_and_slash", 3 + 5 * h, 40 - 5 * h, 0.9] for h in range(H - 1)},
    ]
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(layers))
    general = farspan.parse_method(
        f"vertical_slash:config={path},vertical=10,slash=20,block=8,sinks=2,local=4,last=16"
    )
    data = Data.random(150)
    for index, budgets in (
        (0, [(1, 1)] + [(10, 20)] * (H - 1)),
        (1, [*((3 + 5 * h, 40 - 5 * h) for h in range(H - 1)), (10, 20)]),
    ):
        method = general.for_layer(LayerInfo(index=index, num_heads=H, num_kv_heads=HKV, head_dim=D))
        assert agrees_with_vertical_slash(method, data.q[0], data.k[0], SCALE, budgets) > 0
    half = LayerInfo(index=1, num_heads=H // 2, num_kv_heads=1, head_dim=D, tp_size=2, tp_rank=1)
    shared = general.for_layer(half)
    own = [(3 + 5 * h, 40 - 5 * h) for h in range(H // 2, H - 1)] + [(10, 20)]
    assert agrees_with_vertical_slash(shared, data.q[0, H // 2 :], data.k[0, 1:], SCALE, own) > 0
    with pytest.raises(farspan.FarspanError, match="more than the 2 query heads of layer 1"):
        general.for_layer(LayerInfo(index=1, num_heads=2, num_kv_heads=1, head_dim=D))
    with pytest.raises(farspan.FarspanError, match="for 2 layers and none for layer 2"):
        general.for_layer(LayerInfo(index=2, num_heads=H, num_kv_heads=HKV, head_dim=D))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "no file of MInference's"),
        ("\xff", "no file of MInference's"),
        ('{"0": ["vertical_and_slash", 1, 1]}', "a list with one object per layer"),
        ('"x"', "a list with one object per layer"),
        ("[1]", "a list with one object per layer"),
        ('[["vertical_and_slash", 1, 1]]', "a list with one object per layer"),
        ("[]", "budgets for no head"),
        ("[{}]", "budgets for no head"),
        ('[{"a": ["vertical_and_slash", 1, 1]}]', "layer 0 has 'a'"),
        ('[{"-1": ["vertical_and_slash", 1, 1]}]', "layer 0 has '-1'"),
        ('[{"00": ["vertical_and_slash", 1, 1]}]', "layer 0 has '00'"),
        ('[{"0": 5}]', "head 0 of layer 0 has 5"),
        ('[{}, {"3": []}]', r"head 3 of layer 1 has \[\]"),
        ('[{"0": ["block_sparse", 1, 1, 1]}]', "head 0 of layer 0 the pattern block_sparse"),
        ('[{"0": ["vertical_and_slash"]}]', r'has \["vertical_and_slash"\]'),
        ('[{"0": ["vertical_and_slash", "1", "1"]}]', "both whole numbers"),
        ('[{"0": ["vertical_and_slash", 1, 1.5]}]', "both whole numbers"),
        ('[{"0": ["vertical_and_slash", true, 1]}]', "both whole numbers"),
        ('[{"0": ["vertical_and_slash", 1, 0]}]', "both whole numbers from 1 to 2147483647"),
        ('[{"0": ["vertical_and_slash", 9999999999999999999, 1]}]', "both whole numbers"),
    ],
)
def test_a_file_of_budgets_that_cannot_be_read(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(farspan.FarspanError, match=says) as error:
        farspan.parse_method(f"vertical_slash:config={path}").for_layer(LayerInfo(0, H, HKV, D))
    sentence = str(error.value)
    assert str(path) in sentence and sentence.endswith(".") and "\n" not in sentence


def test_a_file_of_budgets_is_read_anew_once_it_changes(tmp_path: Path) -> None:
    path, info = tmp_path / "patterns.json", LayerInfo(0, 2, 1, D)
    method = farspan.parse_method(f"vertical_slash:config={path},vertical=7,slash=8")
    for vertical in (5, 1234):
        path.write_text(json.dumps([{"1": ["vertical_and_slash", vertical, 6]}]))
        assert method.for_layer(info).budgets.tolist() == [[7, 8], [vertical, 6]]
    path.unlink()
    with pytest.raises(farspan.FarspanError, match="No such file"):
        method.for_layer(info)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("vertical_slash:local=0", "local a whole number, at least 1"),
        ("vertical_slash:config=x.json,mass=0.9", "with neither mass nor gqa_reduce"),
        ("vertical_slash:config=x.json,gqa_reduce=sum", "with neither mass nor gqa_reduce"),
        ("pbs:block=100", "a segment of whole blocks"),
        ("pbs:select=antidiagonal,stride=100", "a stride that divides the block"),
        ("pbs:mass=0", "from 1e-06 to 1"),
        ("pbs:select=max", "mean or antidiagonal"),
    ],
)
def test_refused(spec: str, says: str) -> None:
    with pytest.raises(farspan.FarspanError, match=says):
        farspan.parse_method(spec)
