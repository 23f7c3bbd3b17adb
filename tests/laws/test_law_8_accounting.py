"""Law 8: what is reported is what is read, counted by brute force, and what is not read cannot matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.causal import causal_mask
from farspan.attention.method import DECODE, PREFILL, AttentionMethod

from .tools import HKV, D, Data, H, Selection, Stream, every_method, leaves_out, recorded, replayed

DENSE = farspan.parse_method("dense")
CASES = [  # cuts, starts
    ([160, 180, 181, 182, 183, 184, 185, 190, 191], None),
    ([160, 180, 181, 182, 183, 184, 185, 190, 191], [0, 33, 145]),
    ([26, 27, 28, 29, 30, 31, 32], [0, 3, 25]),
]


def pairs(selections: list[Selection]) -> int:
    """(query head, key) pairs, counted one by one."""
    return sum(int(s.mask().sum()) * H // s.mask().shape[1] for s in selections)


@every_method()
@pytest.mark.parametrize(("cuts", "starts"), CASES)
def test_every_call_is_counted(bound: AttentionMethod, cuts: list[int], starts: list[int] | None) -> None:
    data = Data.random(cuts[-1], starts)
    stream = Stream(bound, data)
    batch = data.q.shape[0]
    per_key = 2 * D * data.k.element_size()
    for a, b in zip([0, *cuts], cuts, strict=False):
        with recorded(bound, DENSE) as seen:
            stream.call(b)
        reads = stream.reads[-1]
        assert reads.pairs == pairs(seen)
        visible = causal_mask(b - a, b, torch.tensor(starts) if starts else None, batch)
        assert reads.causal_pairs == int(visible.sum()) * H
        if seen[0].phase == DECODE:  # each key that the heads of a group share is loaded once per query
            loads = sum(int(s.mask().expand(-1, max(HKV, s.mask().shape[1]), -1, -1).sum()) for s in seen)
            assert reads.kv_bytes == loads * per_key
            assert reads.dense_bytes == int(visible.sum()) * HKV * per_key


@every_method()
@pytest.mark.parametrize("starts", [None, [0, 20]])
def test_a_budget_that_covers_everything_is_named_as_the_reason(
    bound: AttentionMethod, starts: list[int] | None
) -> None:
    """Where only some rows of a batch are short, not everything was read, and no reason for that is given."""
    data = Data.random(60, starts)
    stream = Stream(bound, data)
    for cut in (21, 60):  # rows of 21 keys (and 1); of 60 (and 40)
        stream.length = 0
        with recorded(bound) as seen:
            stream.call(cut)
        reads = stream.reads[-1]
        everything = bool(seen) and all(s.index is None for s in seen) and bound.selective
        assert (reads.reason is not None) == (everything and PREFILL in bound.phases)


@every_method()
def test_the_report_of_a_model(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (2, 120), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :41] = 0
    with patched(method) as patch, recorded(method, DENSE) as seen:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        report = patch.report()
    layers = model.config.num_hidden_layers
    lengths = (120, 79)
    causal = {
        PREFILL: sum(n * (n + 1) // 2 for n in lengths),
        DECODE: sum(n + i for n in lengths for i in range(1, 9)),
    }
    for phase in (PREFILL, DECODE):
        read = pairs([s for s in seen if s.phase == phase])
        assert sum(layer.phases[phase].pairs for layer in report.layers) == read
        want = read / (causal[phase] * H * layers)
        assert math.isclose(report.summary[f"{phase}_density"], want, rel_tol=1e-12)
        sparse = phase in method.phases and leaves_out(method)
        assert (want < 0.95) == sparse, "a method that reads everything, or dense attention that does not"
    assert report.summary["implementation"] == "eager"


@every_method()
@pytest.mark.parametrize(("cuts", "starts"), CASES)
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_poison_where_the_index_does_not_point(
    bound: AttentionMethod, cuts: list[int], starts: list[int] | None, impl: str
) -> None:
    data = Data.random(cuts[-1], starts)
    with recorded(bound, DENSE) as seen:
        stream = Stream(bound, data)
        calls = []
        for cut in cuts:
            before = len(seen)
            stream.call(cut)
            calls.append(seen[before:])
    poisoned = 0
    for a, b, selections in zip([0, *cuts], cuts, calls, strict=False):
        served = bound if selections[0].phase in bound.phases else DENSE
        read = _read(selections, data, a, b)
        results = []
        for inputs in (data, _poisoned(data, read)):
            one = Stream(served, inputs, impl=impl)
            one.length = a
            with replayed(served, selections):
                results.append(one.call(b))
        clean, got = results
        assert torch.equal(got.lse, clean.lse)
        assert torch.equal(got.out, clean.out)
        poisoned += int((~read).sum())
    # By DHSA's columns and diagonals the last queries of a call read everything.
    whole = not leaves_out(bound) or getattr(bound, "select", None) == "vertical_slash"
    assert poisoned > 0 or (whole and starts is None), "the case leaves nothing to poison"


def _read(selections: list[Selection], data: Data, a: int, b: int) -> torch.Tensor:
    """[B, Hkv, b] bool: keys that some query of the call reads. A padded prefill is asked row by row."""
    read = torch.zeros(data.q.shape[0], HKV, b, dtype=torch.bool)
    if len(selections) == 1:
        return _keys(selections[0])
    assert data.starts is not None
    rows = [row for row, first in enumerate(data.starts) if first < b]
    for row, selection in zip(rows, selections, strict=True):
        read[row, :, data.starts[row] :] = _keys(selection)[0]
    return read


def _keys(selection: Selection) -> torch.Tensor:
    mask = selection.mask().any(2)  # [B, Hs, Tk]
    batch, hs, tk = mask.shape
    return mask.expand(-1, HKV, -1) if hs < HKV else mask.view(batch, HKV, hs // HKV, tk).any(2)


def _poisoned(data: Data, read: torch.Tensor) -> Data:
    k, v = data.k.clone(), data.v.clone()
    for x in (k, v):
        x[:, :, : read.shape[2]][~read] = torch.nan
        x[:, :, read.shape[2] :] = torch.nan
    return Data(data.q, k, v, data.starts)
