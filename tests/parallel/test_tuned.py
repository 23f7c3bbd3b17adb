"""Over ranks: adapters of a recipe, and recycled over a given text, as on one device."""

from __future__ import annotations

import pytest
import torch

import farspan
from farspan.attention.recycled import teacher_forced
from farspan.runtime.training.tuned import Tuned

from .jobs import TWO_LAYERS, Case, generated, model_of, over_ranks
from .world import World


@pytest.mark.parametrize("size", [2, 3])
def test_as_on_one_device(size: int, world: World) -> None:
    method = farspan.parse_method("recycled:k=24,stride=5")
    common = {"overrides": TWO_LAYERS, "new": 4}
    training = Tuned(model_of(Case(**common)), method)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in training.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draw)
    recipe = training.recipe({})
    training.close()
    over_text = teacher_forced(method)
    cases = [
        Case(spec=over_text, lengths=(141, 60, 97), **common),
        Case(spec=over_text, lengths=(130,), patch={"prefill_chunk": 50}, **common),
        Case(spec=method, lengths=(61,), patch={"recipe": recipe}, **common),
        Case(spec=method, lengths=(61,), patch={"recipe": recipe, "merge": True}, **common),
    ]
    wanted = [generated(case) for case in cases]
    assert not torch.equal(
        wanted[2]["logits"][0], generated(Case(spec=method, lengths=(61,), **common))["logits"][0]
    )
    for done in world.run(over_ranks, size, cases):
        for case, got, want in zip(cases, done, wanted, strict=True):
            assert torch.equal(got["tokens"][0], want["tokens"][0]), case
            assert (got["logits"][0] - want["logits"][0]).abs().max() < 1e-9, case
