"""FlexAttention's BlockMask: conversion both ways, and block_sparse run by FlexAttention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from farspan.attention.causal import causal_mask
from farspan.attention.errors import Unsupported
from farspan.attention.kv import KV
from farspan.attention.ops.block_sparse import block_sparse
from farspan.attention.selection import BlockIndex
from farspan.attention.softmax import Softmax

from .test_block_sparse import random_blocks
from .tools import make_qkv, oracle

CASES = [  # b, h, hs, tq, tk, block_q, block_k, m
    (1, 4, 2, 500, 500, 64, 64, 3),
    (2, 4, 4, 200, 1021, 64, 32, 9),
    (1, 2, 1, 63, 63, 16, 32, 2),
]


def pairs_visited(mask: object, tq: int, tk: int) -> torch.Tensor:
    """[B, H, Tq, Tk] bool by running through a BlockMask's lists and its mask_mod, pair by pair."""
    block_q, block_k = mask.BLOCK_SIZE
    b, h, nq = mask.kv_num_blocks.shape
    seen = torch.zeros(b, h, tq, tk, dtype=torch.bool)
    rows, cols = torch.arange(tq)[:, None], torch.arange(tk)[None]
    visible = mask.mask_mod(None, None, rows, cols)
    for i in range(b):
        for j in range(h):
            for n in range(nq):
                for number, lists, full in (
                    (mask.kv_num_blocks, mask.kv_indices, False),
                    (mask.full_kv_num_blocks, mask.full_kv_indices, True),
                ):
                    for block in lists[i, j, n, : int(number[i, j, n])].tolist():
                        cut = (
                            slice(n * block_q, (n + 1) * block_q),
                            slice(block * block_k, (block + 1) * block_k),
                        )
                        assert not bool(seen[i, j][cut].any()), "a block is visited once"
                        seen[i, j][cut] = True if full else visible[cut]
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_to_block_mask_visits_the_same_pairs(case: tuple[int, ...], transposed: bool) -> None:
    b, h, hs, tq, tk, block_q, block_k, m = case
    index = random_blocks(b, hs, tq, tk, block_q, block_k, m, empty=True)
    mask = index.to_block_mask(tq, tk, h, transposed=transposed)
    assert mask.shape == (b, h, tq, tk)
    want = index.to_mask(tq, tk).repeat_interleave(h // hs, 1)
    assert torch.equal(pairs_visited(mask, tq, tk), want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back(case: tuple[int, ...]) -> None:
    b, h, hs, tq, tk, block_q, block_k, m = case
    index = random_blocks(b, hs, tq, tk, block_q, block_k, m)
    back = BlockIndex.from_block_mask(index.to_block_mask(tq, tk, h))
    assert (back.block_q, back.block_k) == (block_q, block_k)
    assert torch.equal(back.to_mask(tq, tk), index.to_mask(tq, tk).repeat_interleave(h // hs, 1))
    back.check(tk)


def test_a_block_mask_of_torchs_own_making() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    made = create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=32)
    index = BlockIndex.from_block_mask(made)
    assert torch.equal(index.to_mask(256, 256), causal_mask(256, 256, None, 1))
    q, k, v = make_qkv(2, 4, 2, 256, 256, 16)
    got = block_sparse(q, KV(k, v), BlockIndex.from_block_mask(made, batch=2, heads=2), Softmax(0.25))
    truth = oracle(q, k, v, causal_mask(256, 256, None, 2), scale=0.25)
    assert (got.out - truth.out).abs().max() < 1e-5


def test_what_a_block_mask_cannot_say_is_refused() -> None:
    padded = random_blocks(2, 1, 64, 64, 16, 16, 2, starts=[0, 5])
    with pytest.raises(Unsupported, match="padded by different lengths"):
        padded.to_block_mask(64, 64, 1)
    ordered = random_blocks(1, 1, 64, 64, 16, 16, 2, order=True)
    with pytest.raises(Unsupported, match="reorders the keys"):
        ordered.to_block_mask(64, 64, 1)
    begun = replace(random_blocks(1, 1, 64, 80, 16, 16, 2), lead=3)
    with pytest.raises(Unsupported, match="first query block began before the queries"):
        begun.to_block_mask(61, 80, 1)
    q, k, v = make_qkv(1, 1, 1, 64, 64, 16)
    with pytest.raises(Unsupported, match=r"flex implementation of block_sparse cannot run this.*reorders"):
        block_sparse(q, KV(k, v), ordered, Softmax(0.25), impl="flex")


# On the CPU a C++ compiler takes half a minute; the mask that it is given is compared above.
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_flex_gives_what_block_sparse_gives(device: str) -> None:
    b, h, hkv, tq, tk, d = 1, 4, 2, 128, 256, 32
    index = random_blocks(b, hkv, tq, tk, 64, 64, 3)
    q, k, v = make_qkv(b, h, hkv, tq, tk, d, roomy=False)
    truth = oracle(q, k, v, index.to_mask(tq, tk), scale=d**-0.5)
    moved = BlockIndex(blocks=index.blocks.to(device), counts=index.counts.to(device), block_q=64, block_k=64)
    try:
        got = block_sparse(q.to(device), KV(k.to(device), v.to(device)), moved, Softmax(d**-0.5), impl="flex")
    except Unsupported as refusal:
        assert refusal.reasons == ["on the CPU it is compiled, and there is no C++ compiler"]
        pytest.skip(str(refusal))
    seen = truth.lse > -torch.inf
    assert (got.out.cpu().double() - truth.out)[seen].abs().max() < 1e-5
    if device == "cpu":
        assert bool(got.lse.isnan().all()), "FlexAttention gives no lse on the CPU, and a wrong one must show"
    else:
        assert (got.lse.cpu().double() - truth.lse)[seen].abs().max() < 1e-5
