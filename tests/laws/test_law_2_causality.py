"""Law 2: no row reads a later key, and selection looks ahead no further than the method declares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farspan.attention.causal import causal_mask
from farspan.attention.method import DECODE, PREFILL, AttentionMethod
from farspan.attention.partial import Partial

from .parameters import every_method, leaves_out, lookahead
from .tools import Data, Stream, assert_same, decode_cuts, recorded, replayed

N = 150


@every_method()
@pytest.mark.parametrize("starts", [None, [0, 40, 93]])
@pytest.mark.parametrize("first_cut", [100, 37])
def test_the_index_names_no_later_key(
    bound: AttentionMethod, starts: list[int] | None, first_cut: int
) -> None:
    data = Data.random(N, starts)
    cuts = [first_cut, *decode_cuts(120, 12), 137]
    with recorded(bound) as seen:
        Stream(bound, data).run(cuts)
    if not leaves_out(bound):
        return
    assert {s.phase for s in seen} == set(bound.phases)
    left_out = 0
    for s in seen:
        causal = causal_mask(s.tq, s.tk, s.start, s.batch)
        read = s.mask()
        assert not bool((read & ~causal).any()), f"a {s.phase} call reads a later key or padding"
        valid = causal.any(-1).expand(read.shape[:3])
        assert bool(read.any(-1)[valid].all()), f"a row of a {s.phase} call reads nothing"
        left_out += int((causal & ~read).sum())
    assert left_out > 0, "the parameters leave nothing out, so the test would pass on dense attention"


@every_method()
def test_with_the_index_fixed_later_keys_change_nothing(bound: AttentionMethod) -> None:
    data = Data.random(N)
    other = Data.random(N, seed=1)
    for cuts, begin in (([N], 0), ([130, 143], 130)):  # a whole prefill; 13 candidates decoded at once
        with recorded(bound) as seen:
            want = Stream(bound, data).run(cuts)
        if not bound.selective:
            seen = []
        for change in (begin + 1, begin + 7, cuts[-1] - 1):
            changed = Data(data.q, data.k.clone(), data.v.clone())
            changed.k[:, :, change:] = other.k[:, :, change:]
            changed.v[:, :, change:] = other.v[:, :, change:]
            if seen:
                with replayed(bound, seen):
                    got = Stream(bound, changed).run(cuts)
            else:
                got = Stream(bound, changed).run(cuts)
            assert_same(_rows(got, 0, change), _rows(want, 0, change))


@every_method(PREFILL, whole_prompt=False)
@pytest.mark.parametrize("cuts", [[N], [64, N], [37, N]], ids=["whole", "aligned", "unaligned"])
def test_prefill_selection_looks_no_further_than_declared(bound: AttentionMethod, cuts: list[int]) -> None:
    far = lookahead(bound)
    assert far is not None
    for seed in range(4):
        data, other = Data.random(N, seed=seed), Data.random(N, seed=seed + 100)
        other.k *= 4
        want = Stream(bound, data).run(cuts)
        for change in (
            50,
            69,
            85,
            101,
            149,
        ):  # 69, 85, 101: a query block of 16 begins there after a cut at 37
            got = Stream(bound, _changed(data, other, change)).run(cuts)
            assert_same(_rows(got, 0, change - far), _rows(want, 0, change - far))


@every_method(DECODE)
@pytest.mark.parametrize("prompt", [100, 101, 103])
def test_decode_selection_looks_at_nothing_later(bound: AttentionMethod, prompt: int) -> None:
    """Candidates checked at once: a row must not depend on those after it, through any summary either."""
    data, other = Data.random(N), Data.random(N, seed=1)
    cuts = [*decode_cuts(prompt, 3), prompt + 3 + 13]
    want = Stream(bound, data).run(cuts)
    for change in range(prompt + 4, prompt + 16):
        got = Stream(bound, _changed(data, other, change)).run(cuts)
        assert_same(_rows(got, 0, change), _rows(want, 0, change))


@every_method(DECODE)
@pytest.mark.parametrize("starts", [None, [0, 33, 85]])
@pytest.mark.parametrize("prompt", [20, 22, 100])
def test_candidates_checked_at_once_equal_single_steps(
    bound: AttentionMethod, starts: list[int] | None, prompt: int
) -> None:
    """A decode call of several queries selects once per query: it is so many calls of one query."""
    if starts is not None and prompt < 100:
        starts = [0, 5, prompt - 1]
    data = Data.random(prompt + 30, starts)
    one_by_one = Stream(bound, data).run(decode_cuts(prompt, 30))
    at_once = Stream(bound, data).run([prompt, prompt + 1, prompt + 6, prompt + 22, prompt + 30])
    assert_same(at_once, one_by_one)


@every_method(whole_prompt=False)
def test_model(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    """Tokens changed beyond the lookahead (of every layer in turn) leave earlier logits alone."""
    far = lookahead(method)
    assert far is not None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (1, 160), generator=generator)
    with patched(method) as patch, torch.no_grad():
        want = model(ids).logits
        for change in (70, 128, 159):
            changed = ids.clone()
            changed[:, change:] = torch.randint(3, 128, (1, 160 - change), generator=generator)
            keep = change - far * model.config.num_hidden_layers
            got = model(changed).logits
            assert (got[:, :keep] - want[:, :keep]).abs().max() < 1e-5
            assert (got[:, change:] - want[:, change:]).abs().max() > 1e-2
        if PREFILL in method.phases and method.selective:
            assert patch.report().summary["prefill_density"] < 0.9


def _rows(part: Partial, a: int, b: int) -> Partial:
    return Partial(part.out[:, :, a:b], part.lse[:, :, a:b])


def _changed(data: Data, other: Data, change: int) -> Data:
    """``data`` before position ``change``, ``other`` from there on."""
    both = ((data.q, other.q), (data.k, other.k), (data.v, other.v))
    return Data(*(torch.cat([a[:, :, :change], b[:, :, change:]], 2) for a, b in both))
