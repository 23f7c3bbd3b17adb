"""One selection per group of query heads, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from farspan.attention import gqa


@pytest.mark.parametrize("how", ["sum", "max", "none"])
@pytest.mark.parametrize("at_a_time", [1, 400, 1 << 19])
def test_group_scores_by_heads(how: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of 5 KV heads at once, two at a time, and each alone."""
    monkeypatch.setattr(gqa, "_AT_A_TIME", at_a_time)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, n, 8, generator=generator) for heads, n in ((15, 1), (5, 31)))
    visible = torch.arange(31) >= torch.tensor([0, 9])[:, None, None]
    heads = []

    def rank(q: Tensor, k: Tensor) -> Tensor:
        heads.append(k.shape[1])
        return gqa.group_scores(torch.einsum("bhgtd,bhnd->bhgtn", q.unflatten(1, (-1, 3)), k), visible, how)

    got = gqa.by_heads(rank, q, k)
    assert heads == {1: [1] * 5, 400: [2, 2, 1], 1 << 19: [5]}[at_a_time]
    logits = torch.einsum("bhgtd,bhnd->bhgtn", q.double().unflatten(1, (5, 3)), k.double())
    logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    shares = logits.softmax(-1)
    expected = {"sum": shares.sum(2), "max": shares.amax(2), "none": logits.flatten(1, 2)}[how]
    expected = expected.masked_fill(~visible[:, None], -torch.inf)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
