"""Indices against brute force, pair by pair."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from farspan.attention.causal import causal_mask, causal_pairs
from farspan.attention.kv import KV
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.ops.gather_decode import gather_decode
from farspan.attention.selection import BlockIndex, TokenIndex, Window
from farspan.attention.softmax import Softmax

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
    for a, z in ((0, tq), (0, tq // 2), (tq // 3, tq), (tq - 1, tq)):
        assert int(index.pairs(tq, tk, range(a, z))) == int(want[:, :, a:z].sum())


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("lead", [1, 5, 7])
def test_a_block_index_with_a_lead_is_the_end_of_one_without(permuted: bool, lead: int) -> None:
    """f05: the first query block began ``lead`` queries before the call."""
    generator = torch.Generator().manual_seed(lead)
    tq, tk = 21, 40
    blocks, counts = _random_blocks(1, 2, -(-(tq + lead) // 8), 10, 3, generator)
    order = torch.stack([torch.randperm(tk, generator=generator) for _ in range(2)])[None]
    whole = BlockIndex(
        blocks=blocks, counts=counts, block_q=8, block_k=4, key_order=order if permuted else None
    )
    index, want = replace(whole, lead=lead), whole.to_mask(tq + lead, tk)[:, :, lead:]
    index.check(tk)
    assert torch.equal(index.to_mask(tq, tk), want)
    some = torch.tensor([0, 3, 20])
    assert torch.equal(index.to_mask(tq, tk, rows=some), want[:, :, some])
    for a, z in ((0, tq), (0, 2), (1, 11), (tq - 1, tq)):
        assert int(index.pairs(tq, tk, range(a, z))) == int(want[:, :, a:z].sum())
    for other in (replace(index, lead=8), replace(index, lead=-1), replace(index, start=torch.tensor([0]))):
        with pytest.raises(ValueError, match=r"lead from 0 to block_q - 1, and 0 in a padded batch"):
            other.check(tk)


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


@pytest.mark.parametrize(
    ("blocks", "counts", "message"),
    [
        ([0, 2, 2], 3, "each block of a query block once, in ascending order"),
        ([2, 0, 1], 2, "each block of a query block once, in ascending order"),
        ([0, 1, 7], 3, "blocks 0 to 6 of 100 keys; some block is outside"),
        ([-1, 1, 2], 3, "blocks 0 to 6 of 100 keys; some block is outside"),
        ([0, 1, 2], 4, "room for 3 blocks takes counts from 0 to 3"),
        ([0, 1, 2], -1, "room for 3 blocks takes counts from 0 to 3"),
    ],
)
def test_a_block_index_that_cannot_be_is_refused(blocks: list[int], counts: int, message: str) -> None:
    index = BlockIndex(
        blocks=torch.tensor(blocks, dtype=torch.int32).expand(1, 1, 7, 3),
        counts=torch.full((1, 1, 7), counts, dtype=torch.int32),
        block_q=16,
        block_k=16,
    )
    q = torch.randn(1, 1, 100, 8)
    with pytest.raises(ValueError, match=message):
        block_sparse(q, KV(q, q), index, Softmax(1.0))


@pytest.mark.parametrize(
    ("tokens", "counts", "message"),
    [
        ([3, 5, 3], None, "each token of a query once"),
        ([3, 5, 9], None, "positions 0 to 8; some token is outside"),
        ([3, -1, 5], None, "positions 0 to 8; some token is outside"),
        ([3, 5, 7], 4, "counts from 0 to 3"),
    ],
)
def test_a_token_index_that_cannot_be_is_refused(tokens: list[int], counts: int | None, message: str) -> None:
    index = TokenIndex(
        tokens=torch.tensor(tokens).expand(1, 1, 1, 3),
        counts=None if counts is None else torch.full((1, 1, 1), counts, dtype=torch.int32),
    )
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match=message):
        gather_decode(q, KV(k, k), index, Softmax(1.0))


def test_entries_past_the_count_may_be_anything() -> None:
    TokenIndex(tokens=torch.tensor([[[[3, 3, 99]]]]), counts=torch.tensor([[[1]]])).check(9)
    BlockIndex(
        blocks=torch.tensor([[[[1, 1, 99]]]]), counts=torch.tensor([[[1]]]), block_q=16, block_k=16
    ).check(40)


def _order(tk: int, change: str) -> torch.Tensor:
    order = torch.arange(tk).repeat(1, 1, 1).flip(-1)
    if change == "twice":
        order[..., 3] = order[..., 4]
    elif change == "outside":
        order[..., 3] = tk + 900
    elif change == "short":
        order = order[..., :-9]
    return order


@pytest.mark.parametrize("change", ["twice", "outside", "short"])
def test_a_key_order_that_is_no_permutation_is_refused(change: str) -> None:
    index = BlockIndex(
        blocks=torch.tensor([[[[0, 1]]]]), counts=torch.tensor([[[2]]]), block_q=40, block_k=16,
        key_order=_order(40, change),
    )  # fmt: skip
    q = torch.randn(1, 1, 40, 8)
    with pytest.raises(ValueError, match="every one of 40 positions once"):
        block_sparse(q, KV(q, q), index, Softmax(1.0))


def test_an_index_of_the_wrong_kind_is_refused() -> None:
    q, k = torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40, 8)
    good = {
        "blocks": torch.tensor([[[[0, 1]]]]),
        "counts": torch.tensor([[[2]]]),
        "block_q": 40,
        "block_k": 16,
    }
    for change, message in [
        ({"blocks": torch.zeros(1, 1, 1, 2)}, "holds whole numbers"),
        ({"start": torch.tensor([0.0])}, "holds whole numbers"),
        ({"block_k": 0}, "blocks of at least 1 position; got 40 and 0"),
        ({"blocks": torch.tensor([[[0, 1]]])}, r"takes blocks \[B, Hkv or H, Nq, M\]; got \[1, 1, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            block_sparse(q, KV(k, k), BlockIndex(**(good | change)), Softmax(1.0))
    with pytest.raises(ValueError, match="queries among the keys; got Tq = 40 > Tk = 20"):
        block_sparse(q, KV(k[:, :, :20], k[:, :, :20]), BlockIndex(**good), Softmax(1.0))
    with pytest.raises(ValueError, match="q, k and v of one dtype"):
        block_sparse(q, KV(k.half(), k.half()), BlockIndex(**good), Softmax(1.0))


def test_an_index_of_no_token_reads_nothing() -> None:
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 9, 8)
    for impl in ("reference", "eager"):
        part = gather_decode(
            q, KV(k, k), TokenIndex(tokens=torch.zeros(1, 2, 1, 0, dtype=torch.long)), Softmax(1.0), impl=impl
        )
        assert bool((part.lse == -torch.inf).all()) and bool((part.out == 0).all())
