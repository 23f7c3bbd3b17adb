"""Law 4 with padding on the right: its queries have no part in what a method selects for the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import farspan
from farspan.attention.method import AttentionMethod

from .parameters import every_method

LENGTHS = (110, 57, 90)


def batch(before: tuple[int, ...] = (0, 0, 0)) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of LENGTHS with ``before`` positions of padding on their left, the rest on their right: ids, mask,
    positions."""
    width, draw = max(LENGTHS) + max(before), torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (len(LENGTHS), width), generator=draw)  # padding is no special token
    places, first = torch.arange(width), torch.tensor(before)[:, None]
    mask = (places >= first) & (places < first + torch.tensor(LENGTHS)[:, None])
    return ids, mask.long(), (places - first).clamp(min=0)


def assert_rows_alone(model: Any, got: Tensor, ids: Tensor, mask: Tensor, **how: Any) -> None:
    for b in range(len(ids)):
        row = mask[b].bool()
        want = model(ids[b : b + 1, row], **how).logits[0]
        error = (got[b, row] - want).abs().max()
        assert error < 1e-5, f"row {b} differs by {error:.1e}"


@every_method("prefill")
@pytest.mark.parametrize("before", [(0, 0, 0), (0, 11, 20)])
def test_a_mask_says_so(
    model: Any, patched: Callable[..., Any], method: AttentionMethod, before: tuple[int, ...]
) -> None:
    ids, mask, positions = batch(before)
    for use_cache in (False, True):
        how = {"use_cache": use_cache}
        with patched(method), torch.no_grad():
            got = model(ids, attention_mask=mask, position_ids=positions, **how).logits
            assert_rows_alone(model, got, ids, mask, **how)


@every_method("prefill", whole_prompt=False)
def test_in_chunks(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    ids, mask, positions = batch()
    with patched(method, prefill_chunk=24), torch.no_grad():
        got = model(ids, attention_mask=mask, position_ids=positions).logits
        assert_rows_alone(model, got, ids, mask)


@every_method("prefill")
@pytest.mark.parametrize("tail", ["last", "zero", "one"])
def test_positions_say_so(
    model: Any, patched: Callable[..., Any], method: AttentionMethod, tail: str
) -> None:
    """Positions that stand still behind the tokens, on the cache: without one they are packed sequences."""
    ids, mask, positions = batch()
    last = torch.tensor(LENGTHS)[:, None] - 1
    still = {"last": last, "zero": torch.zeros_like(last), "one": torch.ones_like(last)}[tail]
    positions = torch.where(mask.bool(), positions.expand_as(mask), still)
    with patched(method), torch.no_grad():
        got = model(ids, position_ids=positions).logits
        assert_rows_alone(model, got, ids, mask)


def test_methods_by_the_last_queries_are_left_whole(model: Any) -> None:
    ids, mask, _ = batch()
    with (
        farspan.patch(model, "pbs:mass=0.5,block=8,segment=16", prefill_chunk=32) as patched,
        torch.no_grad(),
    ):
        got = model(ids, attention_mask=mask).logits
        [(reason, count)] = [item for item in patched.report().notices.items() if "prefill_chunk" in item[0]]
    assert "padded on the right" in reason and count == 1
    with farspan.patch(model, "pbs:mass=0.5,block=8,segment=16"), torch.no_grad():
        assert_rows_alone(model, got, ids, mask)


def test_crossover_goes_by_the_row(model: Any) -> None:
    """A row below the crossover is dense though the batch is wider."""
    ids, mask, _ = batch()
    with farspan.patch(model, "block_topk:k=16,block=8", crossover=100), torch.no_grad():
        got = model(ids, attention_mask=mask).logits
    with farspan.patch(model, "dense"), torch.no_grad():
        dense = model(ids, attention_mask=mask).logits
    apart = [(got[b, :n] - dense[b, :n]).abs().max() for b, n in enumerate(LENGTHS)]
    assert apart[0] > 1e-2 and max(apart[1:]) < 1e-5
