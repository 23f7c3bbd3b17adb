"""Indices against brute force, pair by pair."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.index import BlockIndex, TokenIndex, Window, causal_mask, causal_pairs

from .tools import brute_mask

CASES = [(9, 9, [0]), (5, 17, [0, 0]), (9, 9, [0, 4]), (6, 20, [3, 16, 19]), (1, 12, [0, 11])]


@pytest.mark.parametrize(("tq", "tk", "starts"), CASES)
def test_causal_mask_and_pairs(tq: int, tk: int, starts: list[int]) -> None:
    want = brute_mask(tq, tk, starts)
    assert torch.equal(causal_mask(tq, tk, torch.tensor(starts), len(starts)), want)
    assert causal_pairs(tq, tk, starts, len(starts)) == int(want.sum())
    if not any(starts):
        assert torch.equal(causal_mask(tq, tk, None, len(starts)), want)
        assert causal_pairs(tq, tk, None, len(starts)) == int(want.sum())


@pytest.mark.parametrize(("tq", "tk", "starts"), CASES)
@pytest.mark.parametrize(("size", "sinks"), [(1, 0), (3, 2), (4, 0), (100, 3)])
def test_window(tq: int, tk: int, starts: list[int], size: int, sinks: int) -> None:
    got = Window(size=size, sinks=sinks).to_mask(tq, tk, torch.tensor(starts), len(starts))
    assert torch.equal(got, brute_mask(tq, tk, starts, window=size, sinks=sinks))


def _random_blocks(
    b: int, hs: int, nq: int, nk: int, most: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending random blocks; entries past the count are any number, an absurd one too."""
    blocks = torch.full((b, hs, nq, most), 999, dtype=torch.int32)
    counts = torch.randint(0, most + 1, (b, hs, nq), generator=generator, dtype=torch.int32)
    for place in torch.cartesian_prod(torch.arange(b), torch.arange(hs), torch.arange(nq)).tolist():
        c = min(int(counts[tuple(place)]), nk)
        counts[tuple(place)] = c
        blocks[(*place, slice(0, c))] = torch.randperm(nk, generator=generator)[:c].sort().values.int()
    return blocks, counts


def brute_block_mask(index: BlockIndex, tq: int, tk: int) -> torch.Tensor:
    b, hs = index.blocks.shape[:2]
    mask = torch.zeros(b, hs, tq, tk, dtype=torch.bool)
    for row in range(b):
        first = 0 if index.start is None else int(index.start[row])
        for h in range(hs):
            order = list(range(tk)) if index.key_order is None else index.key_order[row, h].tolist()
            for i in range(tq):
                position = tk - tq + i
                if position < first:
                    continue
                n = (i - max(0, first - (tk - tq))) // index.block_q
                for j in index.blocks[row, h, n, : int(index.counts[row, h, n])].tolist():
                    begin = first + j * index.block_k
                    for place in range(begin, min(begin + index.block_k, tk)):
                        if first <= order[place] <= position:
                            mask[row, h, i, order[place]] = True
    return mask


@pytest.mark.parametrize(("tq", "tk", "starts"), [*CASES, (23, 23, [0, 5]), (11, 40, None)])
@pytest.mark.parametrize(("block_q", "block_k"), [(4, 4), (8, 3)])
@pytest.mark.parametrize("permuted", [False, True])
def test_block_index(
    tq: int, tk: int, starts: list[int] | None, block_q: int, block_k: int, permuted: bool
) -> None:
    generator = torch.Generator().manual_seed(tq + tk)
    b, hs = 1 if starts is None else len(starts), 2
    nq, nk = -(-tq // block_q), -(-tk // block_k)
    blocks, counts = _random_blocks(b, hs, nq, nk, 3, generator)
    order = None
    if permuted:  # padding stays in front, as methods sort only what a row has
        order = torch.arange(tk).repeat(b, hs, 1)
        for row in range(b):
            first = starts[row] if starts else 0
            for h in range(hs):
                order[row, h, first:] = first + torch.randperm(tk - first, generator=generator)
    index = BlockIndex(
        blocks=blocks,
        counts=counts,
        block_q=block_q,
        block_k=block_k,
        start=None if starts is None else torch.tensor(starts),
        key_order=order,
    )
    want = brute_block_mask(index, tq, tk)
    assert bool(want.any())
    assert torch.equal(index.to_mask(tq, tk), want)
    assert int(index.pairs(tq, tk)) == int(want.sum())


def test_token_index() -> None:
    tokens = torch.tensor([[[[0, 3, 5], [2, 2, 2]]]])  # [1, 1, 2, 3]
    assert TokenIndex(tokens=tokens).to_mask(2, 8)[0, 0].int().tolist() == [
        [1, 0, 0, 1, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 0, 0, 0],
    ]
    counts = torch.tensor([[[2, 1]]], dtype=torch.int32)
    assert TokenIndex(tokens=tokens, counts=counts).to_mask(2, 8)[0, 0].sum(-1).tolist() == [2, 1]
    empty = torch.tensor([[[0, 1]]], dtype=torch.int32)
    assert TokenIndex(tokens=tokens, counts=empty).to_mask(2, 8)[0, 0].sum(-1).tolist() == [0, 1]
    full = torch.tensor([[[True, False]]])
    got = TokenIndex(tokens=tokens, counts=counts, full=full).to_mask(2, 8, torch.tensor([2]))[0, 0]
    assert got[0].int().tolist() == [0, 0, 1, 1, 1, 1, 1, 0]
    assert got[1].int().tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
