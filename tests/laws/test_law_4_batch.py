"""Law 4: a row alone is the row in a left-padded batch, in prefill and over many decode steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from farspan.attention.method import AttentionMethod
from farspan.attention.partial import Partial

from .parameters import every_method, lookahead
from .tools import Data, Stream, assert_same, decode_cuts


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
    following = torch.randint(3, 128, (3, 10), generator=generator)  # every row crosses into a block of 16
    width = max(len(p) for p in prompts)
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = (torch.arange(width) >= torch.tensor([[width - len(p)] for p in prompts])).long()
    with patched(method), torch.no_grad():
        got = _logits(model, ids, following, mask)
        for b, prompt in enumerate(prompts):
            want = _logits(model, prompt[None], following[b : b + 1], torch.ones(1, len(prompt)).long())
            error = (got[b : b + 1, -want.shape[1] :] - want).abs().max()
            assert error < 1e-5, f"row {b} differs by {error:.1e}"


@every_method()
@pytest.mark.parametrize(
    "cuts",
    [
        [24, 48, 72, 73, 74, 75],
        [20, 36, 44, 60, 64, 72, 73, 74, 75],  # calls of at most 16 tokens in which rows begin (f03)
        [8, 40, 56, 72, 73, 74, 75],
    ],
)
def test_model_fed_in_pieces(
    model: Any, patched: Callable[..., Any], method: AttentionMethod, cuts: list[int]
) -> None:
    """Any pieces of a padded batch: each row gives what it gives alone, cut where the batch is cut (f03,
    f04)."""
    lengths = (72, 61, 40, 13, 5, 1)
    ids, mask = _padded([n + 3 for n in lengths])
    with patched(method), torch.no_grad():
        got = _in_pieces(model, ids, mask, cuts)
        for b, length in enumerate(lengths):
            first = 72 - length
            alone = [cut - first for cut in cuts if cut > first]
            want = _in_pieces(model, ids[b : b + 1, first:], mask[b : b + 1, first:], alone)
            error = (got[b : b + 1, first:] - want).abs().max()
            assert error < 1e-5, f"the row of {length} tokens differs by {error:.1e}"


@every_method()
@pytest.mark.parametrize("chunk", [24, 40])
@pytest.mark.parametrize("batch", ["ragged", "in blocks", "in chunks", "padded alike"])
def test_model_with_prefill_chunk(
    model: Any, patched: Callable[..., Any], method: AttentionMethod, chunk: int, batch: str
) -> None:
    """f05: a row of a padded batch, in chunks, gives what it gives alone in the same ``prefill_chunk``.

    A method that judges a chunk by the chunk's last queries needs the cuts of the row alone: where these do
    not fit each other, each row gives what it gives alone and whole.
    """
    block, width = method.block_multiple, 150
    size = block * -(-chunk // block)
    lengths = {
        "ragged": (150, 101, 38, 7),
        "in blocks": (150, 150 - block, 150 - 3 * block, 20),
        "in chunks": (150, 150 - size, 150 - 2 * size),
        "padded alike": (97, 60),
    }[batch]
    ids, mask = _padded([n + 3 for n in lengths], width + 3)
    alone = [set(range(width - n + size, width - 16, size)) for n in lengths]  # cuts
    fit = all(alone[b] == {x for x in alone[0] if x > width - n} for b, n in enumerate(lengths))
    setting = chunk if fit or lookahead(method) is not None else None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that a batch is not cut
        with patched(method, prefill_chunk=chunk):
            got = _in_pieces(model, ids, mask, range(width, width + 4))
    with patched(method, prefill_chunk=setting), torch.no_grad():
        for b, length in enumerate(lengths):
            first = width - length
            row = ids[b : b + 1, first:], mask[b : b + 1, first:]
            want = _in_pieces(model, *row, range(length, length + 4))
            error = (got[b : b + 1, first:] - want).abs().max()
            assert error < 1e-5, f"the row of {length} tokens differs by {error:.1e}"


def _padded(lengths: list[int], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), rows of these lengths padded on the left, to ``width`` or the longest."""
    width, generator = width or max(lengths), torch.Generator().manual_seed(0)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in zip(ids, lengths, strict=True):
        row[width - n :] = torch.randint(3, 128, (n,), generator=generator)
    return ids, (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


def _logits(model: Any, ids: torch.Tensor, following: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Prefill, then one token at a time, as generate feeds a left-padded batch."""
    n, steps = ids.shape[1], following.shape[1]
    mask = torch.cat([mask, mask.new_ones(len(mask), steps)], 1)
    return _in_pieces(model, torch.cat([ids, following], 1), mask, range(n, n + steps + 1))


def _in_pieces(model: Any, ids: torch.Tensor, mask: torch.Tensor, cuts: Iterable[int]) -> torch.Tensor:
    """The logits of calls that end at ``cuts``, side by side."""
    logits, cache, begin = [], DynamicCache(config=model.config), 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for end in cuts:
        logits.append(model(ids[:, begin:end], mask[:, :end], positions[:, begin:end], cache).logits)
        begin = end
    return torch.cat(logits, 1)
