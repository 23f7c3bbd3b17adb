"""Partial and merge: the identity everything rests on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from farspan.attention.partial import Partial, add_sinks, empty_partial, merge

from .tools import assert_grads_equal, assert_law_5, brute_mask, make_qkv, oracle

SCALE = 0.25


def _cut(mask: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    """The mask cut into disjoint key sets at ``cuts``."""
    cols = torch.arange(mask.shape[-1])
    edges = [0, *cuts, mask.shape[-1]]
    return [mask & (cols >= a) & (cols < b) for a, b in pairwise(edges)]


@pytest.mark.parametrize("cuts", [[20], [0, 20, 20, 63], [1, 2, 3, 40]])
def test_parts_over_disjoint_sets_merge_to_the_whole(cuts: list[int]) -> None:
    q, k, v = make_qkv(2, 4, 2, 63, 63, 16, starts=[0, 30])
    mask = brute_mask(63, 63, [0, 30])
    parts = [oracle(q, k, v, m, scale=SCALE) for m in _cut(mask, cuts)]
    got, want = merge(*parts), oracle(q, k, v, mask, scale=SCALE)
    empty = want.lse == -torch.inf
    assert bool(empty.any())
    assert torch.equal(got.lse[empty], want.lse[empty])
    assert torch.allclose(got.lse[~empty], want.lse[~empty], rtol=1e-13, atol=1e-13)
    assert torch.allclose(got.out, want.out, rtol=1e-12, atol=1e-13)


def test_float32_parts_merge_within_law_5() -> None:
    q, k, v = make_qkv(1, 4, 2, 63, 500, 64)
    mask = brute_mask(63, 500, [0])
    truth = oracle(q, k, v, mask, scale=SCALE)
    single = Partial(truth.out.float(), truth.lse.float())
    parts = [oracle(q, k, v, m, scale=SCALE) for m in _cut(mask, [100, 300])]
    got = merge(*(Partial(p.out.float(), p.lse.float()) for p in parts))
    assert got.out.dtype == got.lse.dtype == torch.float32
    assert_law_5(got, single, truth)


def test_bf16_parts_are_accumulated_in_float32() -> None:
    out = torch.randn(1, 1, 5, 8).bfloat16()
    lse = torch.randn(1, 1, 5)
    got = merge(Partial(out, lse), Partial(-out, lse))
    assert got.out.dtype == torch.float32
    assert bool((got.out == 0).all())
    assert torch.allclose(got.lse, lse + torch.log(torch.tensor(2.0)))


def test_an_empty_part_changes_nothing() -> None:
    q, k, v = make_qkv(1, 2, 1, 5, 9, 8)
    part = oracle(q, k, v, brute_mask(5, 9, [0]), scale=SCALE)
    none = empty_partial(q.double())
    for got in (merge(part, none), merge(none, part), merge(none, part, none)):
        assert torch.equal(got.out, part.out)
        assert torch.equal(got.lse, part.lse)


def test_only_empty_parts_stay_empty() -> None:
    none = empty_partial(torch.zeros(1, 2, 3, 4))
    got = merge(none, none, none)
    assert bool((got.out == 0).all())
    assert bool((got.lse == -torch.inf).all())


def test_extreme_logits_do_not_overflow() -> None:
    a = Partial(torch.ones(1, 1, 1, 2), torch.tensor([[[3000.0]]]))
    b = Partial(torch.zeros(1, 1, 1, 2), torch.tensor([[[-3000.0]]]))
    got = merge(a, b)
    assert torch.equal(got.out, a.out)
    assert torch.equal(got.lse, a.lse)


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one partial"):
        merge()


def test_the_same_parts_give_bit_equal_results() -> None:
    torch.manual_seed(0)
    parts = [Partial(torch.randn(1, 4, 7, 16), torch.randn(1, 4, 7)) for _ in range(5)]
    first, again = merge(*parts), merge(*parts)
    assert torch.equal(first.out, again.out)
    assert torch.equal(first.lse, again.lse)


def test_gradients_are_those_of_the_whole_softmax() -> None:
    """dq, dk, dv through merge, by out and by lse, with rows empty in one part and rows empty in all."""
    leaves = [x.double() for x in make_qkv(2, 4, 2, 20, 40, 8, roomy=False)]
    mask = brute_mask(20, 40, [0, 33])
    weight = torch.randn(2, 4, 20, 8, dtype=torch.float64)
    seen = mask.any(-1).expand(2, 4, 20)

    def grads(merged: bool) -> list[torch.Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in leaves)
        if merged:
            part = merge(*(oracle(q, k, v, m, scale=SCALE) for m in _cut(mask, [5, 25])))
        else:
            part = oracle(q, k, v, mask, scale=SCALE)
        loss = (part.out * weight).sum() + part.lse[seen].cos().sum()
        return list(torch.autograd.grad(loss, (q, k, v)))

    assert_grads_equal(grads(True), grads(False))


def test_merge_passes_gradcheck_beside_an_empty_part() -> None:
    torch.manual_seed(0)
    out_a, out_b = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lse_a = torch.randn(1, 1, 3, dtype=torch.float64, requires_grad=True)
    lse_b = torch.randn(1, 1, 3, dtype=torch.float64)
    lse_b[0, 0, 1] = -torch.inf
    lse_b.requires_grad_()
    merged = merge(Partial(out_a, lse_a), Partial(out_b, lse_b))
    grads = torch.autograd.grad(merged.out.sum() + merged.lse.sum(), (out_a, lse_a, out_b, lse_b))
    assert all(bool(g.isfinite().all()) for g in grads)
    assert torch.equal(grads[2][0, 0, 1], torch.zeros(2, dtype=torch.float64))
    assert grads[3][0, 0, 1] == 0


def test_sinks_are_a_key_with_a_zero_value() -> None:
    q, k, v = (x.double() for x in make_qkv(2, 4, 2, 5, 9, 8, roomy=False))
    sinks = torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64)
    mask = brute_mask(5, 9, [0, 6])
    part = oracle(q, k, v, mask, scale=SCALE)
    got = add_sinks(part, sinks)
    share = torch.exp(part.lse) / (torch.exp(part.lse) + torch.exp(sinks)[None, :, None])
    share = torch.nan_to_num(share, 0.0)  # no key and no sink: 0 / 0
    assert torch.allclose(got.out, part.out * share[..., None], atol=1e-13)
    assert torch.allclose(got.lse, torch.logaddexp(part.lse, sinks[None, :, None]), atol=1e-13)
    assert not bool(got.out.isnan().any())
