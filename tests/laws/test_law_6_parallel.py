"""Law 6: over N ranks = on one device. The same tokens on every rank, logits within rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.method import AttentionMethod

from ..parallel.jobs import Case, generated, over_ranks
from ..parallel.world import World
from .tools import every_method


def _cases(method: AttentionMethod, recipe: Any) -> list[Case]:
    common: dict[str, Any] = {"spec": method, "patch": {"recipe": recipe}}
    return [
        Case(lengths=(5,), new=4, **common),  # shorter than it pays to share out, and than blocks
        Case(lengths=(61,), **common),
        Case(lengths=(257,), **common),
        Case(lengths=(141, 60, 97), **common),  # padded on the left, nothing aligned
        Case(lengths=(61, 33), turns=(30, 1), new=4, **common),  # on a cache that is spread already
        Case(lengths=(130, 83), new=4, **(common | {"patch": {"recipe": recipe, "prefill_chunk": 50}})),
        Case(
            lengths=(61, 5, 29), new=4, how={"prefill_chunk_size": 24}, **common
        ),  # rows begin in short calls
        Case(lengths=(40, 61), new=6, how={"num_beams": 3}, **common),
        Case(lengths=(50,), new=4, how={"do_sample": True, "temperature": 0.8}, **common),
    ]


@every_method()
def test_over_ranks_as_on_one_device(
    method: AttentionMethod, recipe_of: Callable[[AttentionMethod], Any], world: World
):
    every = _cases(method, recipe_of(method))
    alone = [generated(case) for case in every]
    for size, cases in ((3, every), (2, every[1:4]), (4, every[1:4])):
        ranks = world.run(over_ranks, size, cases)
        for i, case in enumerate(cases):
            want = alone[every.index(case)]
            for rank, got in enumerate(done[i] for done in ranks):
                where = f"rank {rank} of {size}, {case}"
                for a, b in zip(got["tokens"], want["tokens"], strict=True):
                    assert torch.equal(a, b), f"other tokens: {where}"
                for a, b in zip(got["logits"], want["logits"], strict=True):
                    assert (a - b).abs().max() < 1e-9, f"other logits: {where}"
                assert got["seen"] == want["seen"]
            if case.lengths == (257,):
                _assert_shared_out([done[i]["report"] for done in ranks], want["report"])


@pytest.mark.parametrize(
    "spec",
    [
        "block_topk:k=24,block=8 + quest:k=16,page=4,dense_layers=0",
        "antidiagonal:mass=0.5,stride=4,block=16 + recycled:k=24,stride=4",
        "a_shape:w=12,sinks=3,block=8 + h2o:k=24",
        "snapkv:k=24,window=8",
        "window:w=12",
    ],
)
def test_rows_of_a_padded_batch_in_phases_of_their_own(spec: str, world: World):
    """Rows below the crossover beside rows above it; rows that begin, or have no token yet, in short calls
    and in chunks."""
    common: dict[str, Any] = {"spec": spec, "new": 6}
    every = [
        Case(lengths=(141, 60, 97), patch={"crossover": 100}, **common),
        Case(lengths=(90, 3, 33), patch={"crossover": 36}, how={"prefill_chunk_size": 40}, **common),
        Case(model="gemma3", lengths=(90, 3, 33), how={"prefill_chunk_size": 40}, **common),
        Case(lengths=(141, 141 - 48, 29), patch={"prefill_chunk": 32}, **common),
    ]
    for size in (2, 3):
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
