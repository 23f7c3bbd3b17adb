"""Recall of attention mass, and what is read of each block, against float64 over every pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan.attention.causal import causal_mask
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.mass import block_reads, mass_recall, recall, sample_rows
from farspan.attention.selection import (
    Band,
    Bands,
    BlockIndex,
    EveryKey,
    Rescaled,
    Selection,
    TokenIndex,
    Window,
)
from farspan.attention.softmax import Softmax

from .tools import brute_mask, make_qkv

H, HKV, D = 6, 2, 8
CALLS = [  # tq, tk, starts
    (37, 37, None),
    (20, 61, None),
    (33, 33, [0, 5]),
    (12, 50, [3, 44, 49]),
    (1, 40, [0, 17]),
    (5, 29, None),
]
KINDS = ["rescaled", "none", "window", "bands", "blocks", "ordered", "tokens", "tokens_full"]


def _order(b: int, hs: int, tk: int, starts: list[int], generator: torch.Generator) -> Tensor:
    """A permutation of each row's positions, its padding left in front."""
    order = torch.arange(tk).repeat(b, hs, 1)
    for row, first in enumerate(starts):
        for h in range(hs):
            order[row, h, first:] = first + torch.randperm(tk - first, generator=generator)
    return order


def build(kind: str, hs: int, tq: int, tk: int, starts: list[int] | None) -> tuple[Selection, Tensor]:
    """A selection, and the mask [B, 1 | Hs, Tq, Tk] of the pairs that it names, written pair by pair."""
    generator = torch.Generator().manual_seed(tq * tk + hs)
    firsts = starts or [0]
    b, past = len(firsts), tk - tq
    causal = brute_mask(tq, tk, firsts)
    start = None if starts is None else torch.tensor(starts)
    if kind == "none":
        return EveryKey(), causal
    if kind == "rescaled":  # other weights, the same keys
        index, mask = build("ordered", hs, tq, tk, starts)
        return Rescaled(read=index, keys=torch.ones(b, H, tk, dtype=torch.bool), factor=0.5), mask
    if kind == "window":
        return Window(size=6, sinks=2), brute_mask(tq, tk, firsts, window=6, sinks=2)
    if kind == "bands":
        mask = torch.zeros(b, 1, tq, tk, dtype=torch.bool)
        for row, first in enumerate(firsts):
            for i in range(tq):
                for j in range(first, past + i + 1):
                    far = past + i - j
                    mask[row, 0, i, j] = far < 3 or (far % 4 == 0 and 4 <= far < 24) or j < first + 2
        return Bands(bands=(Band(1, 0, 3), Band(4, 4, 24)), sinks=2), mask
    if kind in ("blocks", "ordered"):
        block_q, block_k, most = 5, 4, 3
        nq, nk = -(-tq // block_q), -(-tk // block_k)
        blocks = torch.full((b, hs, nq, most), 999, dtype=torch.int32)
        counts = torch.randint(0, min(most, nk) + 1, (b, hs, nq), generator=generator, dtype=torch.int32)
        order = torch.arange(tk).repeat(b, hs, 1)
        if kind == "ordered":
            order = _order(b, hs, tk, firsts, generator)
        mask = torch.zeros(b, hs, tq, tk, dtype=torch.bool)
        for row, h, n in torch.cartesian_prod(*map(torch.arange, (b, hs, nq))).tolist():
            count, first = int(counts[row, h, n]), firsts[row]
            chosen = torch.randperm(nk, generator=generator)[:count].sort().values
            blocks[row, h, n, :count] = chosen.int()
            begin = max(0, first - past) + n * block_q
            for i in range(begin, min(begin + block_q, tq)):
                for j in chosen.tolist():
                    places = range(first + j * block_k, min(first + (j + 1) * block_k, tk))
                    for position in (int(order[row, h, place]) for place in places):
                        mask[row, h, i, position] = first <= position <= past + i
        index = BlockIndex(
            blocks=blocks,
            counts=counts,
            block_q=block_q,
            block_k=block_k,
            start=start,
            key_order=order if kind == "ordered" else None,
        )
        return index, mask
    tokens = torch.zeros(b, hs, tq, 4, dtype=torch.long)
    counts = torch.zeros(b, hs, tq, dtype=torch.int32)
    full = torch.rand(b, hs, tq, generator=generator) < 0.4
    mask = torch.zeros(b, hs, tq, tk, dtype=torch.bool)
    for row, h, i in torch.cartesian_prod(*map(torch.arange, (b, hs, tq))).tolist():
        seen = max(past + i + 1 - firsts[row], 0)
        count = min(4, seen)
        chosen = firsts[row] + torch.randperm(max(seen, 1), generator=generator)[:count]
        counts[row, h, i] = count
        tokens[row, h, i] = firsts[row]
        tokens[row, h, i, :count] = chosen
        mask[row, h, i, chosen] = True
    if kind == "tokens_full":
        mask = torch.where(full[..., None], causal, mask)
    return TokenIndex(tokens=tokens, counts=counts, full=full if kind == "tokens_full" else None), mask


def oracle(q: Tensor, k: Tensor, mask: Tensor, starts: list[int], scale: float, cap: float | None) -> Tensor:
    """[B, H, Tq] float64: the share of softmax(q k^T) that lies on ``mask``; NaN where a row sees nothing."""
    tq, tk = q.shape[2], k.shape[2]
    causal = brute_mask(tq, tk, starts)
    logits = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double().repeat_interleave(H // HKV, 1)) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    shares = torch.softmax(torch.where(causal, logits, -torch.inf), -1)
    mask = (mask & causal).repeat_interleave(H // mask.shape[1], 1)
    return torch.where(causal.any(-1), torch.where(mask, shares, 0.0).sum(-1), torch.nan)


@pytest.mark.parametrize(("tq", "tk", "starts"), CALLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "gqa_reduce", ["sum", "none"]
)  # the heads of a group share an index head, or have their own
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_recall_is_the_share_of_the_true_softmax(
    kind: str, tq: int, tk: int, starts: list[int] | None, gqa_reduce: str, softcap: float | None
) -> None:
    hs = H if gqa_reduce == "none" else HKV
    q, k, v = make_qkv(len(starts or [0]), H, HKV, tq, tk, D, starts=starts)
    q = 2 * q  # peaked enough for the soft-cap to matter
    index, mask = build(kind, hs, tq, tk, starts)
    start = None if starts is None else torch.tensor(starts)
    keys = Keys(kv=KV(k, v), tq=tq, softmax=Softmax(0.5, softcap), start=start)
    clean = torch.where(torch.isnan(k), 0.0, k)  # the padding holds NaN
    want = oracle(q, clean, mask, starts or [0], 0.5, softcap)
    for rows in (torch.arange(tq), sample_rows(tq, 4), torch.tensor([tq - 1, 0])):
        assert torch.equal(index.to_mask(tq, tk, start, len(starts or [0]), rows), mask[:, :, rows])
        got = mass_recall(q, keys, index, rows)
        assert got.shape == (q.shape[0], H, len(rows)) and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want[:, :, rows], rtol=0, atol=2e-6, equal_nan=True)
    if kind == "none":
        seen = ~want.isnan()
        assert bool((mass_recall(q, keys, index, torch.arange(tq))[seen] == 1).all())
    assert keys.summary_bytes == 0, "measuring is no selection"


def test_recall_in_tiles_is_recall_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_qkv(2, H, HKV, 30, 70, D)
    keys = Keys(kv=KV(k, v), tq=30, softmax=Softmax(0.3))
    mask = torch.rand(2, H, 30, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    whole = recall(q, keys, torch.arange(30), mask)
    monkeypatch.setattr("farspan.attention.mass._CPU", 7 * 2 * H * 70)
    torch.testing.assert_close(recall(q, keys, torch.arange(30), mask), whole, rtol=0, atol=1e-6)


def test_recall_of_16_bit_inputs_is_exact_for_them() -> None:
    q, k, v = (x.bfloat16() for x in make_qkv(1, H, HKV, 25, 60, D, roomy=False))
    mask = causal_mask(25, 60, None, 1) & (torch.arange(60) % 3 == 0)
    got = recall(q, Keys(kv=KV(k, v), tq=25, softmax=Softmax(0.5)), torch.arange(25), mask)
    torch.testing.assert_close(got.double(), oracle(q, k, mask, [0], 0.5, None), rtol=0, atol=2e-6)


def test_the_rule_of_the_sample() -> None:
    assert sample_rows(10, 4).tolist() == [1, 4, 6, 9]
    assert sample_rows(3, 16).tolist() == [0, 1, 2]
    for tq in (1, 16, 17, 1000, 4099):
        rows = sample_rows(tq, 16)
        assert len(rows) == min(tq, 16) and rows[-1] == tq - 1 and rows[0] >= 0
        gaps = rows.diff()
        assert len(rows) == 1 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.mark.parametrize("kind", ["none", "window", "bands", "blocks", "ordered"])
@pytest.mark.parametrize(("block_q", "block_k"), [(5, 4), (8, 8), (7, 3), (64, 64)])
@pytest.mark.parametrize(("tq", "tk"), [(37, 37), (20, 61)])
def test_block_reads_counts_pairs(
    kind: str, block_q: int, block_k: int, tq: int, tk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, mask = build(kind, HKV, tq, tk, None)
    causal = brute_mask(tq, tk, [0])
    want = torch.zeros(mask.shape[1], -(-tq // block_q), -(-tk // block_k))
    for h, n, j in torch.cartesian_prod(*map(torch.arange, want.shape)).tolist():
        rows = slice(n * block_q, (n + 1) * block_q), slice(j * block_k, (j + 1) * block_k)
        visible = int(causal[0, 0][rows].sum())
        want[h, n, j] = int(mask[0, h][rows].sum()) / visible if visible else 0.0
    for tile in (1, 1 << 22):
        monkeypatch.setattr("farspan.attention.mass._CPU", tile)
        got = block_reads(index, tq, tk, block_q, block_k, torch.device("cpu"))
        assert torch.equal(got, want)


def test_nothing_of_the_size_of_all_pairs_is_made() -> None:
    """A BlockIndex over 2**18 keys, whose whole mask would take 64 GiB for each head."""
    n, block = 1 << 18, 128
    last = torch.arange(n // block, dtype=torch.int32)
    blocks = torch.stack([torch.zeros_like(last), last], 1)[None, None]
    counts = torch.full((1, 1, n // block), 2, dtype=torch.int32)
    counts[..., 0] = 1
    order = torch.arange(n).view(-1, block).flip(1).flatten().expand(1, 1, n)
    index = BlockIndex(blocks=blocks, counts=counts, block_q=block, block_k=block, key_order=order)
    k = torch.zeros(1, 1, n, 4)  # every key the same: the share is a count
    keys = Keys(kv=KV(k, k), tq=n, softmax=Softmax(1.0))
    rows = sample_rows(n, 4)
    got = mass_recall(torch.zeros(1, 1, n, 4), keys, index, rows)[0, 0]
    own = torch.tensor([int(row) % block + 1 for row in rows])
    assert torch.allclose(got, (block + own) / (rows + 1), rtol=1e-4)
