"""What `farspan plan` says against what is really counted, and its command line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config
from typer.testing import CliRunner

import farspan
from farspan.attention.errors import FarspanError
from farspan.attention.kv import KV
from farspan.attention.ops.flash import flash
from farspan.attention.partial import empty_partial
from farspan.attention.selection import Window
from farspan.attention.softmax import Softmax
from farspan.cli.app import app
from farspan.parallel.group.comm import Ranks
from farspan.parallel.mechanisms.decode import merge_ranks
from farspan.parallel.mechanisms.gather import fetch, gather_all
from farspan.parallel.mechanisms.layout import Layout, usp_split, zigzag
from farspan.parallel.mechanisms.pass_q import pass_q
from farspan.parallel.mechanisms.ring import ring
from farspan.parallel.mechanisms.ulysses import ulysses, unsupported
from farspan.parallel.mechanisms.usp import usp
from farspan.parallel.mechanisms.volume import (
    Geometry,
    PrefillCall,
    choose,
    decode_volume,
    padded,
    readable,
    refusals,
    volumes,
    window_volume,
)
from farspan.parallel.planner.cost import (
    choices,
    decode_reads,
    decode_sent,
    memory,
    prefill_sent,
    stored_rows,
)
from farspan.parallel.planner.device import DEVICES
from farspan.parallel.planner.job import Job, LayerShape, ModelShape
from farspan.parallel.planner.plan import plan

from .world import World

GIB = 1 << 30
LLAMA_405B = ModelShape(
    name="llama-405b", layers=(LayerShape(128, 8, 128),) * 126, hidden=16384, intermediate=53248,
    vocab=128256, parameters=405_853_388_800, layer_parameters=401_650_000_000,
)  # fmt: skip
LLAMA_8B = ModelShape(
    name="llama-8b", layers=(LayerShape(32, 8, 128),) * 32, hidden=4096, intermediate=14336, vocab=128256,
    parameters=8_030_261_248, layer_parameters=6_979_588_096,
)  # fmt: skip


def job(model: ModelShape = LLAMA_8B, length: int = 1 << 17, gpus: int = 8, **changes: Any) -> Job:
    weights = model.parameters * model.element_size
    settings = {"device": DEVICES["H100"], "memory": 80 * GIB, "weights": weights} | changes
    return Job(model=model, length=length, gpus=gpus, **settings)


# --- the formulas, against bytes that have really travelled --------------------------------------


def sent(group: Any, heads: int, kv_heads: int, dim: int, new: int, past: int, batch: int) -> dict[str, int]:
    """Bytes that this rank sends by each mechanism, at bfloat16."""
    ranks, rank = Ranks(group), Ranks(group).rank
    split, held = zigzag(past, past + new, ranks.size), zigzag(0, past, ranks.size).layout()
    layout = held if past else Layout.empty(ranks.size)

    def rows(heads: int, n: int) -> torch.Tensor:
        return torch.randn(batch, heads, n, dim).bfloat16()

    q, k, v = rows(heads, split.rows), rows(kv_heads, split.rows), rows(kv_heads, split.rows)
    old_k, old_v = rows(kv_heads, layout.count(rank)), rows(kv_heads, layout.count(rank))
    stored: dict[str, Any] = {"past": layout, "past_k": old_k, "past_v": old_v} if past else {}
    found = {}

    def count(name: str) -> None:
        found[name] = sum(ranks.sent.values())
        ranks.sent.clear()

    gather_all(k, v, old_k, old_v, layout, split, ranks)
    count("gather")
    ring(q, k, v, split, ranks, softmax=Softmax(1.0), **stored)
    count("ring")
    if not unsupported(heads, kv_heads, ranks.size):
        ulysses(q, k, v, split, ranks, lambda q, k, v: flash(q, KV(k, v), Softmax(1.0)), **stored)
        count("ulysses")
    pass_q(q, k, v, split, ranks, softmax=Softmax(1.0), **stored)
    count("pass_q")
    merge_ranks(empty_partial(q[:, :, :1]), q.dtype, ranks)
    count("decode")
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "new", "past", "batch"),
    [
        (12, 12, 64, 0, 1),
        (12, 4, 63, 0, 2),
        (8, 2, 250, 0, 1),
        (12, 1, 21, 0, 1),
        (6, 3, 1, 0, 1),
        (12, 4, 50, 96, 2),
        (12, 12, 7, 24, 1),
        (9, 3, 3, 120, 1),
    ],
)
def test_volumes_are_the_bytes_that_travel(
    world: World, size: int, heads: int, kv_heads: int, new: int, past: int, batch: int
):
    geometry = Geometry(heads, kv_heads, 8, 2)
    expected = volumes(geometry, PrefillCall(size, new, past, batch=batch))
    absent = refusals(geometry, size, past)
    for found in world.run(sent, size, heads, kv_heads, 8, new, past, batch):
        assert found.pop("decode") == decode_volume(geometry, size, batch=batch)
        passed = found.pop("pass_q")
        assert passed == expected.pop("pass_q", passed)
        assert found == expected
        assert ("ulysses" in found) == ("ulysses" not in absent)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("past", [1, 5, 61])
def test_an_uneven_past_is_padded_by_gather_alone(world: World, size: int, past: int):
    geometry = Geometry(6, 6, 8, 2)
    most = stored_rows(past, size)
    expected = volumes(geometry, PrefillCall(size, 10, past, past_rows=most))
    for found in world.run(sent, size, 6, 6, 8, 10, past, 1):
        assert found["gather"] == expected["gather"]
        assert found["ring"] <= expected["ring"] and found["ulysses"] <= expected["ulysses"]


def sent_by_usp(group: Any, new: int) -> int:
    """P = 4 as 2 x 2; the two subgroups are made of the whole job's ranks, as all its processes must do."""
    import torch.distributed as dist

    rank = dist.get_rank(group)
    pairs = [[0, 1], [2, 3], [0, 2], [1, 3]]
    groups = [dist.new_group(pair) for pair in pairs]
    inner, outer = groups[rank // 2], groups[2 + rank % 2]
    a, b = Ranks(inner), Ranks(outer)
    split = usp_split(0, new, 2, 2)
    q, k, v = (torch.randn(1, h, split.rows, 8).bfloat16() for h in (8, 2, 2))
    usp(q, k, v, split, a, b, softmax=Softmax(1.0))
    return sum(a.sent.values()) + sum(b.sent.values())


@pytest.mark.parametrize("new", [64, 37, 3])
def test_usp_volume(world: World, new: int):
    expected = volumes(Geometry(8, 2, 8, 2), PrefillCall(4, new, ulysses=2))["usp"]
    assert world.run(sent_by_usp, 4, new) == [expected] * 4


def sent_by_fetch(group: Any, new: int, window: int) -> int:
    ranks = Ranks(group)
    split = zigzag(0, new, ranks.size)
    k, v = (torch.randn(1, 2, split.layout().count(ranks.rank), 8).bfloat16() for _ in range(2))
    wanted = torch.zeros(1, 2, new, dtype=torch.bool)
    for _, chunk in split.slots(ranks.rank):
        wanted[:, :, : chunk[1]] |= Window(size=window).needed(chunk, [0], 2, k.device)
    into = torch.empty(1, 2, new, 8).bfloat16(), torch.empty(1, 2, new, 8).bfloat16()
    fetch(wanted, k, v, split.layout(), *into, ranks)
    return sum(ranks.sent.values())


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("new", "window"), [(240, 8), (96, 100), (61, 5)])
def test_window_volume_bounds_what_a_rank_sends(world: World, size: int, new: int, window: int):
    """The mean over ranks: the formula leaves out that the ring of chunks has two ends and a turn."""
    geometry = Geometry(4, 2, 8, 2)
    mean = sum(world.run(sent_by_fetch, size, new, window)) / size
    most = window_volume(geometry, PrefillCall(size, new), window)
    bits = (size - 1) * 2 * -(-new // 8)
    assert mean <= most
    if window < new / (2 * size):
        assert mean - bits >= (most - bits) * (2 * size - 2) / (2 * size) - 1e-9


def test_published_formulas():
    """PARALLEL.md's, with S filled up to the split."""
    h, hkv, d, e = 32, 8, 128, 2
    geometry = Geometry(h, hkv, d, e)
    for p, u in ((2, None), (4, 2), (8, 4), (16, 8)):
        s = padded(1001, p)
        found = volumes(geometry, PrefillCall(p, 1001, ulysses=u))
        assert s >= 1001 and s % p == 0
        assert found["gather"] == found["ring"] == (p - 1) * s * 2 * hkv * d * e // p
        assert found["ulysses"] == (p - 1) * s * (2 * h + 2 * max(hkv, p)) * d * e // p**2
        if u:
            r = p // u
            inner = (u - 1) * (s // r) * (2 * h + 2 * max(hkv, u)) * d * e // u**2
            assert found["usp"] == inner + (r - 1) * s * 2 * -(-hkv // u) * d * e // r
        assert volumes(geometry, PrefillCall(p, 1001, 7))["pass_q"] == (p - 1) * s * h * (d * 2 * e + 4) // p
        assert decode_volume(geometry, p, tokens=3) == 3 * (p - 1) * h * (d * e + 4)


# --- the choice ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "how", "mechanism", "part"),
    [
        (32, 8, 1, {}, "gather", "nothing travels"),
        (32, 8, 4, {}, "gather", "ulysses 480 MiB"),
        (32, 8, 8, {}, "ulysses", "gather 448 MiB"),
        (32, 8, 3, {}, "gather", "3 ranks do not divide 32 query heads"),
        (12, 3, 2, {}, "gather", "3 KV heads can neither be divided among 2 ranks"),
        (32, 8, 16, {"ulysses": 8}, "usp", "ulysses 180 MiB"),
        (32, 8, 16, {"ulysses": 16}, "ulysses", "gather 480 MiB"),
        (32, 8, 3, {"memory": 512 << 20}, "ring", "gather (1.0 GiB) would hold more than the 512 MiB"),
        (32, 8, 3, {"memory": 1}, "ring", "and so does ring (341 MiB), which needs least"),
    ],
)
def test_choice(heads: int, kv_heads: int, ranks: int, how: dict[str, int], mechanism: str, part: str):
    choice = choose(
        Geometry(heads, kv_heads, 128, 2),
        PrefillCall(ranks, 1 << 17, ulysses=how.get("ulysses")),
        how.get("memory"),
    )
    assert choice.mechanism == mechanism and part in choice.reason, choice


def test_pass_q_is_taken_where_few_new_tokens_meet_a_long_cache():
    """T / (T + cached) < Hkv / H, but for the lse that travels beside the output."""
    geometry, ranks, cached = Geometry(28, 4, 128, 2), 8, 1 << 20  # ulysses is out: 8 does not divide 28
    for new, expected in ((1 << 10, "pass_q"), (1 << 16, "pass_q"), (1 << 18, "gather"), (1 << 20, "gather")):
        assert (new / (new + cached) < 4 / 28) == (expected == "pass_q")
        assert choose(geometry, PrefillCall(ranks, new, cached)).mechanism == expected


def test_readable():
    sizes = (0, 999, 1 << 10, 1_000_000, 3 << 30, 5 << 50)
    assert [readable(n) for n in sizes] == ["0 B", "999 B", "1.0 KiB", "977 KiB", "3.0 GiB", "5120 TiB"]


# --- memory, traffic, time -----------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 5, 63, 1000, 4096, 100_003])
def test_cache_is_what_the_fullest_rank_holds(ranks: int, length: int):
    layout = zigzag(0, length, ranks).layout()
    most = max(layout.count(rank) for rank in range(ranks))
    assert memory(job(length=length, gpus=ranks))[0]["kv_cache"] == most * 32 * 2 * 8 * 128 * 2
    assert most <= length / ranks + 2, (
        "each of a rank's two chunks is at most one token longer than the least"
    )


def test_sliding_layers_keep_their_window():
    layers = (LayerShape(32, 8, 128, 1024),) * 5 + (LayerShape(32, 8, 128),)
    model = replace(LLAMA_8B, layers=layers)
    length, ranks = 1 << 16, 4
    layout = zigzag(0, length, ranks).layout().cut(length - 1024, length)
    window = max(layout.count(rank) for rank in range(ranks))
    found = memory(job(model, length, ranks))[0]["kv_cache"]
    assert found == (5 * window + length // ranks) * 2 * 8 * 128 * 2
    only_full = prefill_sent(job(replace(model, layers=layers[5:]), length, ranks), ["gather"])
    sliding = window_volume(Geometry(32, 8, 128, 2), PrefillCall(ranks, length), 1024)
    assert prefill_sent(job(model, length, ranks), ["gather"]) == only_full + 5 * sliding


def test_plan_of_a_layer_is_the_sum_of_its_parts():
    ask = job(gpus=8, chunk=1 << 14)
    found = plan(ask)
    geometry = Geometry(32, 8, 128, 2)
    calls = [(1 << 14, past) for past in range(0, 1 << 17, 1 << 14)]
    taken = [choose(geometry, PrefillCall(8, new, past, ulysses=8)) for new, past in calls]
    assert [choice.mechanism for choice in choices(ask)] == [choice.mechanism for choice in taken]
    assert found.sent_prefill == 32 * sum(choice.volumes[choice.mechanism] for choice in taken)
    assert found.sent["gather"] == 32 * sum(
        volumes(geometry, PrefillCall(8, new, past))["gather"] for new, past in calls
    )
    assert found.sent_decode == 32 * decode_volume(geometry, 8)
    assert found.read == (1 << 14) * 32 * geometry.kv and found.selection_read == 0
    assert found.needed == sum(found.memory.values()) and found.fits
    assert found.memory["weights"] == 2 * LLAMA_8B.parameters


def test_longest_is_where_it_stops_fitting():
    found = plan(job(length=1 << 17))
    assert plan(job(length=found.longest)).fits
    assert not plan(job(length=round(found.longest * 1.04))).fits


def test_what_does_not_fit_and_what_helps():
    text = " ".join(plan(job(length=1 << 20, gpus=2)).notes)
    assert "It does not fit: a device needs" in text and "has 80.0 GiB" in text
    assert "It fits on 4 GPUs." in text or "It fits on 8 GPUs." in text
    gpus = next(n for n in (4, 8) if f"It fits on {n} GPUs." in text)
    assert plan(job(length=1 << 20, gpus=gpus)).fits and not plan(job(length=1 << 20, gpus=gpus // 2)).fits
    chunked = plan(job(length=1 << 20, gpus=4, memory=60 * GIB))
    advice = next(note for note in chunked.notes if "--prefill-chunk" in note)
    chunk = int(advice.split()[-1].rstrip("."))
    assert plan(job(length=1 << 20, gpus=4, memory=60 * GIB, chunk=chunk)).fits
    weights = plan(job(LLAMA_405B, gpus=8, memory=141 * GIB)).notes
    assert any("--tensor-parallel 8" in note and "weights alone" in note for note in weights)


@pytest.mark.parametrize(
    ("spec", "phase", "density", "selection"),
    [
        ("dense", "decode", 1.0, 0.0),
        ("quest:k=1008,page=16", "decode", 0.01008, 1 / 16),
        ("quest:k=none,fraction=0.1,page=16", "decode", 0.1, 1 / 16),
        ("quest:k=1000", "prefill", 1.0, 0.0),
        ("double_sparsity:k=1000,group_factor=2", "decode", 0.01, 1 / 4),
        ("double_sparsity:k=1000", "decode", 0.01, 1 / 8),
        ("recycled:k=1000,stride=10", "decode", 0.01 * 9 / 10 + 1 / 10, 1 / 20),
        ("window:w=996,sinks=4", "decode", 0.01, 0.0),
        ("window:w=996,sinks=4", "prefill", (1000 * 100_000 - 1000 * 999 / 2) / 5_000_050_000, 0.0),
        ("recycled:k=200000", "decode", 1.0, 0.0),
    ],
)
def test_what_is_planned_of_a_method(spec: str, phase: str, density: float, selection: float):
    """In prefill the pairs over the causal ones: a window of 1 % of the keys are 2 % of the pairs."""
    method = {phase: farspan.parse_method(spec)}
    ask = job(length=100_000, gpus=1, **method)
    found = ask.prefill_cost if phase == "prefill" else ask.decode_cost
    assert found.density == pytest.approx(density, rel=1e-4)
    assert found.selection == pytest.approx(selection, rel=1e-4)


def test_labels_of_narrow_heads():
    """Double Sparsity keeps 32 channels of a key whatever its size: half of 64 are a quarter of K and V."""
    model = replace(LLAMA_8B, layers=(LayerShape(32, 8, 64),) * 32)
    ask = job(model, length=100_000, decode=farspan.parse_method("double_sparsity:k=1000"))
    assert ask.decode_cost.selection == pytest.approx(1 / 4)


# A plan for 128K once took block_static for a window of one key, strided for a window of 128, and
# vertical_slash for its sinks alone. These count each query's keys by the definitions.
def butterfly(t: int) -> int:
    """The own block as far as it is seen, and a whole block of 128 for each bit of its number."""
    return t % 128 + 1 + 128 * (t // 128).bit_count()


def strided(t: int) -> int:
    """The last 128 keys, and every 128th key before them."""
    return min(t + 1, 128) + t // 128


@pytest.mark.parametrize(("spec", "count"), [("block_static", butterfly), ("strided", strided)])
def test_patterns_are_planned_for_all_they_read(spec: str, count: Callable[[int], int]):
    length = 1 << 17
    ask = job(prefill=farspan.parse_method(spec))
    want = sum(map(count, range(length))) / (length * (length + 1) / 2)
    assert ask.prefill_cost.density == pytest.approx(want, rel=1e-3)
    found, dense = plan(ask), plan(job())
    assert found.notes == [] and found.mechanisms == ["fetch"]
    assert found.sent_prefill > found.sent["gather"], "their keys lie anywhere, not in a window"
    assert found.sent_least == pytest.approx(found.sent_prefill * count(length - 1) / length, rel=1e-6)
    windowed = plan(job(prefill=farspan.parse_method("window:w=128,sinks=0")))
    assert windowed.prefill_seconds < found.prefill_seconds < dense.prefill_seconds
    assert windowed.sent_least == windowed.sent_prefill < found.sent_least


def test_vertical_slash_is_planned_as_dense():
    """How many blocks its diagonals pass depends on where they lie."""
    found, dense = plan(job(prefill=farspan.parse_method("vertical_slash"))), plan(job())
    assert (found.prefill_seconds, found.sent_prefill) == (dense.prefill_seconds, dense.sent_prefill)
    assert found.sent_least == found.sent_prefill
    assert found.notes == ["vertical_slash counts as dense in prefill: what it reads depends on the data."]


@pytest.mark.parametrize(
    ("phase", "spec", "note"),
    [
        ("prefill", "antidiagonal", "counts as dense in prefill: what it reads depends on the data."),
        ("prefill", "sale:threshold=1", "counts as dense in prefill: what it reads depends on the data."),
        (
            "prefill",
            "oracle:mass=0.9,fraction=0.1",
            "counts as reading 10.0 % of the keys in prefill, its upper bound",
        ),
        (
            "decode",
            "recycled:dynamic=true",
            "counts as reading 22.5 % of the keys in decode, its upper bound",
        ),
        ("prefill", "act:heads=all", "counts as dense in prefill: it reads every one of 131072 tokens."),
        ("decode", "h2o:k=200000", "counts as dense in decode: it reads every one of 131072 tokens."),
        ("prefill", "block_topk", None),
        ("decode", "quest", None),
    ],
)
def test_notes_on_what_is_planned_of_a_method(phase: str, spec: str, note: str | None):
    method = farspan.parse_method(spec)
    found = plan(job(**{phase: method})).notes
    assert len(found) == (note is not None)
    assert note is None or f"{method} {note}" in found[0]


def test_a_method_scales_what_is_read_and_moved():
    dense = plan(job())
    sparse = plan(job(decode=farspan.parse_method("quest:k=1312,page=16,dense_layers=2")))
    part = 2 / 32 + 30 / 32 * 1312 / (1 << 17)
    assert sparse.read == pytest.approx(dense.read * part, rel=1e-6)
    assert sparse.selection_read == pytest.approx(dense.read * 30 / 32 / 16, rel=1e-6)
    assert sparse.decode_seconds < dense.decode_seconds and sparse.sent_decode == dense.sent_decode
    ranked = job(decode=farspan.parse_method("double_sparsity:k=1024,dense_layers=2"))
    assert decode_sent(ranked) == dense.sent_decode + 30 * 7 * 8 * 1024 * 8
    assert decode_reads(ranked)[0] == pytest.approx(dense.read * (2 + 30 / 128) / 32, rel=1e-6)
    blocks = plan(job(prefill=farspan.parse_method("block_topk:k=4096")))
    assert blocks.mechanisms == ["fetch"]
    assert blocks.sent_least < 0.04 * blocks.sent["gather"] < blocks.sent["gather"] < blocks.sent_prefill
    assert blocks.prefill_seconds < dense.prefill_seconds


@pytest.mark.parametrize(("length", "published", "within"), [(1 << 20, 77.0, 0.1), (1 << 17, 3.8, 0.35)])
def test_published_yardstick(length: int, published: float, within: float):
    """Llama 3 405B on 128 H100, 16 ranks of 8: 1M tokens in 77 s, 128K in 3.8 s (2411.01783).

    A check of the operations counted: the paper's own 63 % of peak is near the utilisation assumed. At 128K
    the plan is 30 % too fast, and the tolerance says so.
    """
    found = plan(job(LLAMA_405B, length, 128, tensor=8, weights=500 * 10**9, mechanism="ring"))
    assert found.prefill_seconds == pytest.approx(published, rel=within)


def test_bad_jobs():
    for changes, part in (
        ({"gpus": 6, "tensor": 4}, "cannot be cut into groups of 4"),
        ({"gpus": 12, "tensor": 12}, "does not divide both 32 query heads"),
        ({"mechanism": "magic"}, "no mechanism 'magic'"),
        ({"length": 0}, "length of at least 1"),
        ({"gpus": 1_000_000}, "up to 4096 ranks"),
    ):
        with pytest.raises(FarspanError, match=part):
            job(**changes)
    with pytest.raises(FarspanError, match="3 ranks do not divide 32 query heads"):
        plan(job(gpus=3, mechanism="ulysses"))


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    """A model's config, and not a single weight."""
    path, config = tmp_path_factory.mktemp("plan") / "config-only", tiny_llama().config
    config.dtype = "float32"
    config.save_pretrained(path)
    return path


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["plan", *arguments])


def as_json(*arguments: str) -> Any:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_command_reads_the_config_alone(folder: Path, tiny_llama: Any):
    found = as_json("--model", str(folder), "--length", "4K", "--gpus", "2", "--gpu-memory", "1G")
    model = tiny_llama()
    assert found["memory"]["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["memory"]["kv_cache"] == 2 * 2048 * 2 * 2 * 16 * 4
    assert found["fits"] and found["ranks"] == 2
    geometry = Geometry(8, 2, 16, 4)
    assert found["bytes_sent_per_rank"]["prefill_by_mechanism"] == {
        name: 2 * size for name, size in volumes(geometry, PrefillCall(2, 4096)).items()
    }
    assert found["bytes_sent_per_rank"]["decode_per_token"] == 2 * decode_volume(geometry, 2)


def test_command_on_the_alias(smollm2: Any):
    found = as_json("--length", "128K", "--gpus", "3", "--gpu", "h200", "--method", "quest:k=512")
    saved = torch.bfloat16.itemsize  # the plan is for a GPU; a CPU may have loaded another dtype
    assert found["memory"]["weights"] == sum(p.numel() * saved for p in smollm2[0].parameters())
    assert found["device"] == {"name": "H200", "memory": 141 * GIB}
    assert found["method"]["decode"].startswith("quest")


def test_command_prints_what_does_not_fit(folder: Path):
    done = invoke("--model", str(folder), "--length", "1M", "--gpus", "2", "--gpu-memory", "128M")
    assert done.exit_code == 0 and "It does not fit: a device needs" in done.output
    assert "memory of each GPU" in done.output and "prefill by gather" in done.output
    assert max(map(len, done.output.split("Mechanism:")[0].splitlines())) <= 100
    done = invoke("--model", str(folder), "--length", "4K", "--gpus", "2")
    assert "It fits into the memory; so would" in done.output and "positions" not in done.output


def test_command_says_that_the_prompt_is_beyond_the_positions(folder: Path, tmp_path: Path):
    """4,096 positions: 4K tokens have a place, 16K do not, and the memory has nothing to do with it."""
    ask = ["--model", str(folder), "--gpus", "2"]
    note = (
        "config-only has 4096 positions, and 16384 tokens are more: it reads nonsense past them; stretch them"
    )
    [found] = as_json(*ask, "--length", "16K")["notes"]
    assert note in found and found.endswith("--rope yarn:4 where you run it.")
    assert (
        as_json(*ask, "--length", "4K")["notes"] == []
        and as_json(*ask, "--length", "4K")["positions"] == 4096
    )
    assert as_json(*ask, "--length", "2M")["notes"][0].endswith("--rope yarn:2097152 where you run it.")
    config = GPT2Config(vocab_size=128, n_positions=256, n_embd=64, n_layer=2, n_head=4)
    config.save_pretrained(tmp_path / "gpt2")
    [found] = as_json("--model", str(tmp_path / "gpt2"), "--gpus", "2", "--length", "1K")["notes"]
    assert "gpt2 has 256 positions" in found and "cannot be stretched" in found and "yarn" not in found


@pytest.mark.parametrize(
    "arguments",
    [
        ["--length", "1T", "--gpus", "8"],
        ["--length", "1M", "--gpus", "4096"],
        ["--length", "64M", "--gpus", "128", "--prefill-chunk", "4K"],
        ["--length", "4K", "--gpus", "8", "--gpu-memory", "1000000T", "--batch-size", "1T"],
    ],
    ids=" ".join,
)
def test_large_numbers_are_answered_quickly(folder: Path, arguments: list[str]):
    began = time.perf_counter()
    found = as_json("--model", str(folder), *arguments)
    assert time.perf_counter() - began < 60
    assert found["fits"] is (found["memory"]["needed"] <= found["device"]["memory"])
    assert math.isfinite(found["seconds"]["prefill"]) and found["seconds"]["prefill"] > 0


def test_the_calls_of_a_chunked_prefill():
    ask = job(length=10, chunk=4)
    assert ask.calls == [(4, 0), (4, 4), (2, 8)] and ask.num_calls == 3
    assert job(length=10).calls == job(length=10, chunk=64).calls == [(10, 0)]


def test_simulate_writes_and_prints(folder: Path, tmp_path: Path):
    out = tmp_path / "new" / "simulated"
    ask = ["--model", str(folder), "--length", "1M", "--gpus", "4", "--simulate", "--ranks", "1,2,8,64"]
    done = invoke(*ask, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "Strong scaling: 1048576 tokens" in done.output and "Weak scaling: 262144 tokens" in done.output
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "scaling.json").read_text())
    assert {row["ranks"] for row in saved["rows"]} == {1, 2, 8, 64}
    assert as_json(*ask)["rows"] == saved["rows"]
