"""Recycled Attention over a given text: what its decode steps compute, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import farspan
from farspan import FarspanError
from farspan.attention.method import AttentionMethod
from farspan.attention.partial import Partial
from farspan.attention.recycled import teacher_forced

from .tools import Data, Stream, assert_same, recorded, replayed

LENGTH = 61
SETTINGS = [
    {"k": 16, "stride": 7},
    {"k": 16, "stride": 8, "pool": 5},
    {"k": 5, "stride": 12, "gqa_reduce": "max"},  # every chosen key is replaced, then the oldest newcomer
    {"k": 9, "stride": 1},
    {"k": 20, "stride": 100},  # no full step before the end
]


def over_text(settings: dict[str, Any]) -> tuple[AttentionMethod, AttentionMethod]:
    """(recycled, its form for training)."""
    method = farspan.methods()["recycled"](**settings)
    made = teacher_forced(method)
    assert made is not None
    return method, made


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_decode_token_by_token(settings: dict[str, Any]) -> None:
    """The oracle is the decode path itself, which test_definitions.py compares with a naive one: a dense
    prompt up to the first full step, then one step for each token of the text."""
    method, made = over_text(settings)
    data = Data.random(LENGTH, [0, 0], seed=1)
    first = -(-settings["k"] // settings["stride"]) * settings["stride"]
    steps = Stream(method, data)
    prompt = min(first + 1, LENGTH)
    want = steps.run([prompt, *range(prompt + 1, LENGTH + 1)])
    whole = Stream(made, data)
    with recorded(made) as selections:
        assert_same(whole.run([LENGTH]), want)
    [selection] = selections
    pairs = int(selection.mask().sum()) * (data.q.shape[1] // selection.mask().shape[1])
    assert int(whole.reads[0].pairs) == pairs
    assert pairs == sum(int(x.pairs) for x in steps.reads)


def test_chunks_of_whole_strides_and_padded_rows() -> None:
    _, made = over_text({"k": 16, "stride": 7})
    data = Data.random(LENGTH, [0, 9, 50], seed=2)
    whole = Stream(made, data).run([LENGTH])
    for b in range(3):
        alone = Stream(made, data.row(b)).run([LENGTH - (data.starts or [0])[b]])
        own = slice((data.starts or [0])[b], None)
        assert_same(Partial(whole.out[b : b + 1, :, own], whole.lse[b : b + 1, :, own]), alone)
    one = data.row(0)
    assert_same(Stream(made, one).run([21, 42, LENGTH]), Stream(made, one).run([LENGTH]))


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
def test_gradients_are_those_of_masked_attention(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of one stretch each, with the choice fixed, against float64 softmax under the mask."""
    from farspan.attention.ops.reference import masked_attention
    from farspan.attention.selection import stretches

    monkeypatch.setattr(stretches, "_CPU", 1)
    _, made = over_text(settings)
    data = Data.random(LENGTH, seed=3)
    inputs = [x.requires_grad_() for x in (data.q, data.k, data.v)]
    with recorded(made) as selections:
        Stream(made, data).run([LENGTH])
    with replayed(made, selections):
        got = Stream(made, data).run([LENGTH])
    want = masked_attention(*inputs, selections[0].mask(), scale=data.scale)
    assert_same(got, want)
    weight = torch.randn(got.out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.autograd.grad((x.out * weight).sum() + x.lse.sum(), inputs) for x in (got, want))
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine - its).abs().max() < 1e-10


def test_the_switch_is_explicit() -> None:
    method, made = over_text({"k": 24, "stride": 4})
    assert "prefill" not in method.phases and "prefill" in made.phases
    assert farspan.methods()["recycled"] is type(method), "the form for training has no name of its own"
    assert teacher_forced(farspan.parse_method("quest")) is None
    with pytest.raises(FarspanError, match="fixed schedule: leave dynamic out"):
        teacher_forced(farspan.parse_method("recycled:dynamic=true"))
