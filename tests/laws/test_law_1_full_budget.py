"""Law 1: with a budget of at least the length, output equals dense attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.method import AttentionMethod

from .parameters import every_method_with_full_budget
from .tools import Data, Stream, assert_same, decode_cuts

DENSE = farspan.parse_method("dense")


@every_method_with_full_budget()
@pytest.mark.parametrize("starts", [None, [0, 17, 61]])
def test_attention(bound: AttentionMethod, starts: list[int] | None) -> None:
    data = Data.random(75, starts)
    cuts = [*decode_cuts(63, 6), 74]  # the last call decodes five candidates at once
    assert_same(Stream(bound, data).run(cuts), Stream(DENSE, data).run(cuts))


@every_method_with_full_budget()
def test_the_budget_is_full_at_any_length(method: AttentionMethod) -> None:
    """Else a budget that covers the short sequences below would pass for a full one."""
    costs = [method.cost(phase, 100_000) for phase in method.phases]
    assert all(cost.density == 1 or not cost.exact for cost in costs)


@every_method_with_full_budget()
def test_model(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    """Against the unpatched model: greedy tokens and the logits behind them, a padded batch included."""
    ids = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    how = {
        "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    want = model.generate(ids, **how)
    with patched(method) as patch:
        got = model.generate(ids, **how)
        summary = patch.report().summary
    assert torch.equal(got.sequences, want.sequences)
    error = max((a - b).abs().max() for a, b in zip(got.logits, want.logits, strict=True))
    assert error < 1e-5
    assert summary["prefill_density"] == summary["decode_density"] == 1.0


def test_a_budget_of_exactly_the_length_is_full() -> None:
    data = Data.random(60)
    cuts = [50, 60]
    want = Stream(DENSE, data).run(cuts)
    quest = "quest:k=60,dense_layers=0"  # not a whole number of pages
    for spec in ("recycled:k=60", quest, "window:w=60,sinks=0", "window:w=56,sinks=4"):
        assert_same(Stream(farspan.parse_method(spec), data).run(cuts), want)
