"""Law 4: a row alone is the row in a left-padded batch, in prefill and over many decode steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from farspan.attention.method import AttentionMethod
from farspan.attention.partial import Partial

from .tools import Data, Stream, assert_same, decode_cuts, every_method


@every_method()
@pytest.mark.parametrize(
    ("prompt", "starts"),
    [
        (120, [0, 31, 97]),
        (120, [97, 0]),
        (60, [0, 40, 59]),  # rows of 20 and 1 keys: shorter than every budget, growing beyond it
        (120, [50, 50]),
        (120, [0, 0]),  # no padding at all
        (20, [0, 2]),  # every row shorter than the budget at first
        (25, [0, 1, 2, 3]),  # a budget of 24 is crossed by one row after the other
    ],
)
def test_attention(bound: AttentionMethod, prompt: int, starts: list[int]) -> None:
    steps = 32
    data = Data.random(prompt + steps + 5, starts)
    together = Stream(bound, data)
    got = together.run([*decode_cuts(prompt, steps), prompt + steps + 5])
    assert bool((got.out[1, :, : starts[1]] == 0).all()), "queries in the padding give zeros"
    pairs = [0] * len(together.reads)
    for b, first in enumerate(starts):
        alone = Stream(bound, data.row(b))
        n = prompt - first
        want = alone.run([*decode_cuts(n, steps), n + steps + 5])
        row = Partial(got.out[b : b + 1, :, first:], got.lse[b : b + 1, :, first:])
        assert_same(row, want)
        pairs = [total + reads.pairs for total, reads in zip(pairs, alone.reads, strict=True)]
    assert pairs == [reads.pairs for reads in together.reads], "a row is counted as it would be alone"


@every_method()
@pytest.mark.parametrize(("prompt", "cut", "starts"), [(120, 60, [0, 31, 97]), (120, 60, [0, 59])])
def test_a_padded_batch_in_two_chunks(
    bound: AttentionMethod, prompt: int, cut: int, starts: list[int]
) -> None:
    """Rows may begin in the second chunk only. A row alone is cut where the batch cuts it."""
    data = Data.random(prompt + 12, starts)
    got = Stream(bound, data).run([cut, *decode_cuts(prompt, 12)])
    for b, first in enumerate(starts):
        n = prompt - first
        if first < cut and prompt - cut <= 16:
            continue  # alone, what follows the cut would be a decode step
        alone = [cut - first] if cut > first else []
        want = Stream(bound, data.row(b)).run([*alone, *decode_cuts(n, 12)])
        assert_same(Partial(got.out[b : b + 1, :, first:], got.lse[b : b + 1, :, first:]), want)


@every_method()
def test_model(model: Any, patched: Callable[..., Any], method: AttentionMethod) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (n,), generator=generator) for n in (110, 57, 14)]
    following = torch.randint(3, 128, (3, 20), generator=generator)
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = (torch.arange(width) >= torch.tensor([[width - len(p)] for p in prompts])).long()
    with patched(method), torch.no_grad():
        got = _logits(model, ids, following, mask)
        for b, prompt in enumerate(prompts):
            want = _logits(model, prompt[None], following[b : b + 1], torch.ones(1, len(prompt)).long())
            error = (got[b : b + 1, -want.shape[1] :] - want).abs().max()
            assert error < 1e-5, f"row {b} differs by {error:.1e}"


def _logits(model: Any, ids: torch.Tensor, following: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Prefill, then one token at a time, as generate feeds a left-padded batch."""
    logits, cache = [], None
    tokens = [ids, *following.split(1, 1)]
    for token in tokens:
        if cache is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -token.shape[1] :]
        output = model(
            token, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)
