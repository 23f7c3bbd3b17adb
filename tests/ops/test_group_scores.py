"""One selection per group of query heads, against its definition."""

from __future__ import annotations

import pytest
import torch

from farspan.attention import gqa


@pytest.mark.parametrize("how", ["sum", "max"])
@pytest.mark.parametrize("at_a_time", [1, 400, 1 << 19])
def test_group_scores(how: str, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the softmax is taken one head or two heads at a time."""
    monkeypatch.setattr(gqa, "_AT_A_TIME", at_a_time)
    logits = torch.randn(2, 5, 3, 1, 31, generator=torch.Generator().manual_seed(0))
    visible = torch.arange(31) >= torch.tensor([0, 9])[:, None, None]
    hidden = logits.double().masked_fill(~visible[:, None, None], -torch.inf).softmax(-1)
    expected = (hidden.sum(2) if how == "sum" else hidden.amax(2)).masked_fill(~visible[:, None], -torch.inf)
    torch.testing.assert_close(gqa.group_scores(logits, visible, how).double(), expected, rtol=1e-5, atol=1e-7)
