"""``estimate_topk``: a right choice up to rounding at the cut, in ascending order, of what the length
allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan.attention.lists import TokenLists
from farspan.attention.ops.estimate_topk import estimate_topk
from farspan.attention.ops.estimate_topk.reference import estimates
from farspan.attention.softmax import Softmax

from .tools import Run, every_run

B, H, HKV = 2, 8, 2


def make(
    d: int, total: int, room: int, page: int | None, starts: list[int] | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, entries that are NaN outside the rows, channels."""
    generator = torch.Generator().manual_seed(total)
    q = torch.randn(B, H, 1, d, generator=generator).to(dtype)
    keys = torch.randn(B, HKV, total, d, generator=generator).to(dtype)
    first = starts or [0] * B
    if page is None:
        channels = torch.stack([torch.randperm(d, generator=generator)[:11] for _ in range(HKV)])
        entries = torch.full((B, HKV, room, 11), torch.nan, dtype=dtype)
        for b in range(B):
            own = channels[:, None].expand(-1, total - first[b], -1)
            entries[b, :, first[b] : total] = keys[b, :, first[b] :].gather(2, own)
        return q, entries, channels
    entries = torch.full((B, HKV, -(-room // page), 2 * d), torch.nan, dtype=dtype)
    for b in range(B):
        for number, part in enumerate(keys[b, :, first[b] :].split(page, 1)):
            entries[b, :, number] = torch.cat([part.amax(1), part.amin(1)], -1)
    return q, entries, None


@every_run()
@pytest.mark.parametrize(
    ("d", "total", "room", "k", "page", "starts", "reduce", "softcap"),
    [
        (64, 300, 333, 40, None, None, "sum", None),
        (64, 301, 301, 40, None, [0, 290], "max", 2.0),  # the second row is shorter than k
        (128, 77, 5000, 16, None, [3, 4], "none", None),  # most of the room is empty
        (64, 1, 9, 4, None, None, "sum", None),
        (64, 300, 333, 48, 16, None, "max", None),
        (64, 25, 40, 26, 16, None, "sum", None),  # all keys, though two whole pages are more than k
        (64, 289, 300, 48, 16, [0, 250], "sum", None),  # a page that has just begun
        (64, 288, 300, 40, 16, [0, 250], "none", 2.0),  # a full one; k holds half a page more
        (128, 301, 301, 7, 16, [1, 2], "sum", None),  # less than a page
        (64, 5000, 5001, 64, 2, None, "sum", None),  # pages in two chunks
        (64, 105, 140, 0.1, None, [0, 20], "sum", None),  # half a key more than 10, and than 8
        (64, 300, 333, 0.5, 16, [0, 250], "max", None),
        (64, 25, 30, 1.0, 4, [0, 3], "none", None),  # all of it
    ],
)
def test_estimate_topk(
    d: int, total: int, room: int, k: int | float, page: int | None, starts: list[int] | None, reduce: str,
    softcap: float | None, run: Run,
) -> None:  # fmt: skip
    q, entries, channels = make(d, total, room, page, starts, run.dtype)
    length, softmax = torch.tensor([total], dtype=torch.int32), Softmax(d**-0.5, softcap)
    start = None if starts is None else torch.tensor(starts)
    fraction, k = (k, None) if isinstance(k, float) else (None, k)
    how = {"fraction": fraction, "page": page, "channels": channels, "reduce": reduce, "start": start}
    moved = {name: run.to(x) if isinstance(x, Tensor) else x for name, x in how.items()}
    want = estimate_topk(q.double(), entries.double(), softmax, length, k, **how, impl="reference")
    got = estimate_topk(*map(run.to, (q, entries)), softmax, run.to(length), k, **moved, impl=run.impl)
    group = H // want.tokens.shape[1]
    for b in range(B):
        first = 0 if starts is None else starts[b]
        for head in range(want.tokens.shape[1]):
            mine, right = tokens(got, b, head), tokens(want, b, head)
            assert mine == sorted(set(mine)) and len(mine) == len(right)
            kv = head * HKV // want.tokens.shape[1]
            heads = q[b, head * group : (head + 1) * group, 0].double()
            own = None if channels is None else channels[kv]
            if page is None:
                scores = estimates(heads, entries[b, kv, first:total].double(), softmax, own, reduce)[0]
                assert_near(mine, right, lambda t, s=scores, f=first: float(s[t - f]), run.dtype)
            else:
                last = (total - first - 1) // page
                scores = estimates(heads, entries[b, kv, :last].double(), softmax, None, reduce)[0]
                pages = [sorted({(t - first) // page for t in some}) for some in (mine, right)]
                assert pages[0][-1] == last
                assert_near(pages[0][:-1], pages[1][:-1], lambda p, s=scores: float(s[p]), run.dtype)
                assert mine == [
                    t for p in pages[0] for t in range(first + p * page, min(first + p * page + page, total))
                ]


def tokens(lists: TokenLists, b: int, head: int) -> list[int]:
    row = lists.tokens[b, head, 0]
    return (row if lists.counts is None else row[: int(lists.counts[b, head, 0])]).tolist()


def assert_near(mine: list[int], right: list[int], score, dtype: torch.dtype) -> None:
    """Another choice only where scores are within rounding of the cut."""
    cut = min(map(score, right), default=0.0)
    for t in set(mine) ^ set(right):
        assert abs(score(t) - cut) <= 1e-5 * max(abs(cut), 1e-3) + (2e-2 if dtype == torch.bfloat16 else 0)


@every_run()
def test_equal_estimates_go_to_the_lowest_position(run: Run) -> None:
    q, entries = torch.ones(1, 2, 1, 16), torch.ones(1, 1, 100, 4)
    entries[:, :, 50:60] = 2
    given = run.to(q.to(run.dtype)), run.to(entries.to(run.dtype)), Softmax(1.0)
    channels = run.to(torch.arange(4)[None])
    got = estimate_topk(
        *given, run.to(torch.tensor([90], dtype=torch.int32)), 15, channels=channels, impl=run.impl
    )
    assert tokens(got, 0, 0) == [0, 1, 2, 3, 4, *range(50, 60)]


def test_estimate_topk_refuses_what_does_not_fit() -> None:
    q, entries, length = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 10, 32), torch.tensor([7])
    for match, k, how in [
        ("give page or channels", 4, {}),
        ("k and page of at least 1", 0, {"page": 4}),
        ("k or fraction; got k=4 and fraction=0.5", 4, {"page": 4, "fraction": 0.5}),
        ("reduce 'sum', 'max' or 'none'", 4, {"page": 4, "reduce": "mean"}),
        (r"entries \[B, Hkv, any, 3\]", 4, {"channels": torch.zeros(2, 3, dtype=torch.long)}),
    ]:
        with pytest.raises(ValueError, match=match):
            estimate_topk(q, entries, Softmax(1.0), length, k, **how)
