"""What `farspan plan` says of the choice of mechanism, memory, traffic and time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import farspan
from farspan.attention.errors import FarspanError
from farspan.parallel.mechanisms.layout import zigzag
from farspan.parallel.mechanisms.volume import (
    Geometry,
    PrefillCall,
    choose,
    decode_volume,
    readable,
    volumes,
    window_volume,
)
from farspan.parallel.planner.cost import (
    choices,
    decode_reads,
    decode_sent,
    memory,
    prefill_sent,
)
from farspan.parallel.planner.device import DEVICES
from farspan.parallel.planner.job import Job, LayerShape, ModelShape
from farspan.parallel.planner.plan import plan

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


def test_contiguous_shards_of_models_with_recurrent_layers():
    """Rank P - 1 has (2 P - 1) / P times the mean work of attention; in chunks, which follow a past, less."""
    hybrid = replace(LLAMA_8B, in_order=True)
    zigzagged, whole = plan(job(mechanism="gather")), plan(job(hybrid, mechanism="gather"))
    chunked = plan(job(hybrid, chunk=8192))
    assert any("the last one has 1.88 times the mean work" in note for note in whole.notes)
    assert any("the last one has 1.05 times the mean work" in note for note in chunked.notes)
    assert not any("contiguous" in note for note in [*zigzagged.notes, *plan(job(hybrid, gpus=1)).notes])
    assert whole.sent["gather"] == zigzagged.sent["gather"] and whole.memory == zigzagged.memory
    assert whole.prefill_seconds > zigzagged.prefill_seconds


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
