"""Law 6: over N ranks = on one device. The same tokens on every rank, logits within rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.method import AttentionMethod

from ..parallel.jobs import (
    TWO_LAYERS,
    Case,
    generated,
    other_gates_over_ranks,
    over_ranks,
    refused_over_ranks,
    stepped,
    stepped_over_ranks,
)
from ..parallel.world import World
from ..runtime.mixed_gate import MixedGate
from ..runtime.pooled_gate import PooledGate
from .parameters import every_method


def _common(method: AttentionMethod, recipe: Any) -> dict[str, Any]:
    return {"spec": method, "overrides": TWO_LAYERS, "patch": {"recipe": recipe}}


def _plain(common: dict[str, Any]) -> list[Case]:
    """Whole prompts. Decode crosses a border of the ranks' blocks of 8 tokens in each of them."""
    return [
        Case(lengths=(61,), new=5, **common),
        Case(lengths=(253,), new=6, **common),
        Case(lengths=(141, 60, 97), new=6, **common),  # padded on the left, nothing aligned
    ]


def _cut(common: dict[str, Any]) -> list[Case]:
    """Prompts in turns and in chunks."""
    chunked = common | {"patch": common["patch"] | {"prefill_chunk": 50}}
    return [
        Case(lengths=(61, 33), turns=(30, 1), new=4, **common),  # on a cache that is spread already
        Case(lengths=(130, 83), new=4, **chunked),
    ]


def _corners(common: dict[str, Any]) -> list[Case]:
    """Short prompts and the other ways to generate."""
    return [
        Case(lengths=(5,), new=4, **common),  # shorter than it pays to share out, and than blocks
        Case(
            lengths=(61, 5, 29), new=4, how={"prefill_chunk_size": 24}, **common
        ),  # rows begin in short calls
        Case(lengths=(40, 61), new=4, how={"num_beams": 3}, **common),
        Case(lengths=(50,), new=4, how={"do_sample": True, "temperature": 0.8}, **common),
    ]


def _assert_as_on_one_device(world: World, plan: dict[int, list[Case]]) -> None:
    """The cases of ``plan`` over as many ranks as their key says."""
    alone: dict[int, Any] = {}
    for size, cases in plan.items():
        ranks = world.run(over_ranks, size, cases)
        for i, case in enumerate(cases):
            if id(case) not in alone:
                alone[id(case)] = generated(case)
            want = alone[id(case)]
            for rank, got in enumerate(done[i] for done in ranks):
                where = f"rank {rank} of {size}, {case}"
                for a, b in zip(got["tokens"], want["tokens"], strict=True):
                    assert torch.equal(a, b), f"other tokens: {where}"
                for a, b in zip(got["logits"], want["logits"], strict=True):
                    assert (a - b).abs().max() < 1e-9, f"other logits: {where}"
                assert got["seen"] == want["seen"]
            if case.lengths == (253,):
                _assert_shared_out([done[i]["report"] for done in ranks], want["report"])


@every_method(evicting_in_some_heads=False)
@pytest.mark.parametrize("part", ["whole", "padded", "cut", "corners"])
def test_over_ranks_as_on_one_device(
    method: AttentionMethod,
    recipe_of: Callable[[AttentionMethod], Any],
    world: World,
    part: str,
):
    common = _common(method, recipe_of(method))
    one, long, padded = _plain(common)
    plans = {
        "whole": {3: [one, long], 2: [long]},
        "padded": {3: [padded], 4: [padded]},
        "cut": {3: _cut(common)},
        "corners": {3: _corners(common)},
    }
    _assert_as_on_one_device(world, plans[part])


@pytest.mark.slow
@every_method(evicting_in_some_heads=False)
def test_every_size_as_on_one_device(
    method: AttentionMethod, recipe_of: Callable[[AttentionMethod], Any], world: World
):
    plain = _plain(_common(method, recipe_of(method)))
    _assert_as_on_one_device(world, {2: plain, 4: plain})


@pytest.mark.parametrize("spec", ["snapkv:k=20,window=6,evict=true", "h2o:k=13,evict=true"])
def test_what_evicts_as_on_one_device(spec: str, world: World):
    """Keys that are left are divided among the ranks again; further prompts, chunks, padding and beams."""
    common = _common(farspan.parse_method(spec), None)
    _, long, padded = _plain(common)
    plan = {2: [long, *_cut(common)], 3: [long, padded, *_cut(common)[:1], *_corners(common)[1:3]]}
    _assert_as_on_one_device(world, plan)


def test_gates_as_on_one_device(world: World):
    """Gates that are fed queries and keys before RoPE and hidden states, with summaries of these, of queries,
    of values and of positions, per block and per token."""
    mixed, pooled = _common(MixedGate(), None), _common(PooledGate(), None)
    _, long, padded = _plain(mixed)
    short, begun, beams, _ = _corners(mixed)
    plan = {3: [padded, *_cut(mixed), begun, beams], 2: [long, _cut(pooled)[0]], 4: [padded, short]}
    _assert_as_on_one_device(world, plan)


def test_gates_have_the_same_weights_on_every_rank(world: World):
    for refused in world.run(other_gates_over_ranks, 3):
        assert "different values: the methods on rank 1" in refused


def test_gates_after_crops_as_on_one_device(world: World):
    """What summaries read of queries and hidden states is kept for a crop, and is the same on every rank."""
    common = _common(MixedGate(), None)
    cases = [
        Case(calls=(90, 1, 5, -4, 1, 40, -30, 3, 1), **common),
        Case(calls=(50, -9, 1, 1, -24, 30, 6, -3, 2), **common),
    ]
    ranks = world.run(stepped_over_ranks, 3, cases)
    for i, case in enumerate(cases):
        want = stepped(case)
        for got in (done[i] for done in ranks):
            for a, b in zip(got["logits"], want["logits"], strict=True):
                assert (a - b).abs().max() < 1e-9, case
    for refused in world.run(refused_over_ranks, 2, Case(calls=(120, -69, 1), **common)):
        assert "a summary needs the hidden states of the tokens from position 48 on" in refused


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("block_topk:k=24,block=8 + quest:k=16,page=4,dense_layers=0", 3),
        ("antidiagonal:mass=0.5,stride=4,block=16 + recycled:k=24,stride=4", 2),
        ("a_shape:w=12,sinks=3,block=8 + h2o:k=24", 3),
        ("snapkv:k=24,window=8", 2),
        ("window:w=12", 3),
    ],
)
def test_rows_of_a_padded_batch_in_phases_of_their_own(spec: str, size: int, world: World):
    """Rows below the crossover beside rows above it; rows that begin, or have no token yet, in short calls
    and in chunks."""
    common: dict[str, Any] = {"spec": spec, "new": 6}
    every = [
        Case(lengths=(141, 60, 97), patch={"crossover": 100}, **common),
        Case(lengths=(90, 3, 33), patch={"crossover": 36}, how={"prefill_chunk_size": 40}, **common),
        Case(model="gemma3", lengths=(90, 3, 33), how={"prefill_chunk_size": 40}, **common),
        Case(lengths=(141, 141 - 48, 29), patch={"prefill_chunk": 32}, **common),
    ]
    ranks = world.run(over_ranks, size, every)
    for i, case in enumerate(every):
        want = generated(case)
        for got in (done[i] for done in ranks):
            assert torch.equal(got["tokens"][0], want["tokens"][0]), case
            assert (got["logits"][0] - want["logits"][0]).abs().max() < 1e-9, case
        if "prefill_chunk_size" not in case.how:  # every rank reads a row that begins in a short call
            _assert_shared_out([done[i]["report"] for done in ranks], want["report"])


def _assert_shared_out(parts: list[farspan.Report], whole: farspan.Report) -> None:
    """What the ranks have read adds up to what one device reads (law 8)."""
    for layer, want in enumerate(whole.layers):
        for phase in ("prefill", "decode"):
            for name in ("pairs", "causal_pairs"):
                got = sum(getattr(part.layers[layer].phases[phase], name) for part in parts)
                assert got == getattr(want.phases[phase], name), f"{name} in {phase}, layer {layer}"
