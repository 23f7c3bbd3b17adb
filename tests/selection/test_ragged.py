"""Ragged lists of tokens against lists of Python."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.selection import TokenIndex
from farspan.attention.selection.ragged import counted_first


def lists(candidates: torch.Tensor, mask: torch.Tensor, ascending: bool) -> list[list[int]]:
    """Of each row the candidates that count."""
    rows = zip(candidates.flatten(0, -2).tolist(), mask.flatten(0, -2).tolist(), strict=True)
    kept = [[token for token, counts in zip(*row, strict=True) if counts] for row in rows]
    return [sorted(row) for row in kept] if ascending else kept


def random_candidates(seed: int, k: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.rand(2, 3, 4, 50, generator=generator).argsort(-1)[..., :k]
    return candidates, torch.rand(2, 3, 4, k, generator=generator) < share


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("given", ["mask", "counts"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 7])
def test_what_counts_comes_first_and_the_rest_is_harmless(
    ascending: bool, given: str, share: float, k: int
) -> None:
    candidates, mask = random_candidates(k, k, share)
    counted = mask
    if given == "counts":
        counted = mask.sum(-1)
        mask = torch.arange(k) < counted[..., None]
    tokens, counts = counted_first(candidates, counted, ascending=ascending)
    want = lists(candidates, mask, ascending)
    assert tokens.shape == (2, 3, 4, max(map(len, want)))
    numbers = [tokens.shape[-1]] * 24 if counts is None else counts.flatten().tolist()
    assert (counts is None) == (len(set(map(len, want))) == 1), "counts only where rows differ"
    first = candidates.flatten(0, -2)[:, 0].tolist()
    for row, number, kept, spare in zip(tokens.flatten(0, -2).tolist(), numbers, want, first, strict=True):
        assert row[:number] == kept
        assert set(row[number:]) <= set(kept or [spare])


def test_rows_are_broadcast() -> None:
    candidates, mask = random_candidates(3, 6, 0.5)
    want = counted_first(candidates[:, :1].repeat(1, 3, 1, 1), mask[:, :1].repeat(1, 3, 1, 1))
    got = counted_first(candidates[:, :1].expand(-1, 3, -1, -1), mask[:, :1])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_ragged_token_index() -> None:
    candidates, mask = random_candidates(5, 9, 0.4)
    index = TokenIndex.ragged(candidates, mask, ascending=True)
    index.check(50)
    want = torch.zeros(2, 3, 4, 50, dtype=torch.bool).scatter_(-1, candidates, mask)
    assert torch.equal(index.to_mask(4, 50), want)


def test_on_a_device_no_shape_depends_on_the_data() -> None:
    """The meta device holds no data: whatever looks at it fails."""
    candidates, mask = (x.to("meta") for x in random_candidates(5, 9, 0.4))
    for counted in (mask, mask.sum(-1)):
        for ascending in (False, True):
            tokens, counts = counted_first(candidates, counted, ascending=ascending)
            assert tokens.shape == (2, 3, 4, 9)
            assert counts is not None and counts.shape == (2, 3, 4)
