"""gather_rows against torch.gather."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.ops.rows import gather_rows


def _layouts() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    room = torch.randn(3, 4, 40, 8)
    return {
        "contiguous": torch.randn(3, 4, 20, 8),
        "roomy": room[:, :, :20],
        "beginning later": room[1:, :, 7:27],
        "one row": room[2:3, 1:2, 5:25],
        "heads last": torch.randn(3, 20, 4, 8).transpose(1, 2),
        "expanded": torch.randn(1, 4, 20, 8).expand(3, -1, -1, -1),
        "every second": room[:, :, ::2],
        "channels first": torch.randn(3, 4, 8, 20).transpose(2, 3),
        "wide rows": torch.randn(3, 4, 20, 11)[..., :8],
    }


@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("grad", [False, True])
def test_gather_rows_reads_any_layout(layout: str, grad: bool) -> None:
    x = _layouts()[layout]
    if grad:
        x = x.requires_grad_()
    b, h, t, d = x.shape
    rows = torch.randint(0, t, (b, h, 13), generator=torch.Generator().manual_seed(0))
    want = x.gather(2, rows[..., None].expand(b, h, 13, d))
    for index in (rows, rows.int()):
        got = gather_rows(x, index)
        assert torch.equal(got, want)
    if grad:
        assert got.requires_grad
