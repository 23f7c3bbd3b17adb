"""State parts that grow, against lists of one row's tokens."""

from __future__ import annotations

import pytest
import torch

from farspan.attention.hybrid.growing import Growing, places


@pytest.mark.parametrize("every", [1, 3])
def test_rows_under_padding_keep_the_entries_of_the_rows_alone(every: int) -> None:
    part = Growing(shape=(2,), dtype=torch.float32, every=every)
    entries, tokens = torch.zeros(3, 0, 2), torch.zeros(3, dtype=torch.int64)
    rows: list[list[torch.Tensor]] = [[], [], []]
    for length, lefts in ((7, (0, 4, 7)), (1, (0, 0, 0)), (2, (0, 0, 1)), (5, (0, 0, 0))):
        new = torch.randn(3, length, 2)
        mask = torch.arange(length) >= torch.tensor(lefts)[:, None]
        before = entries.clone()
        at = places(tokens, mask if any(lefts) else None, length)
        after = part.append(entries, new, at)
        assert torch.equal(entries, before)
        entries, tokens = after, at.end
        for row, left in enumerate(lefts):
            rows[row] += new[row, left:]
            want = rows[row][every - 1 :: every]
            assert tokens[row] == len(rows[row])
            assert at.position[row, left:].tolist() == list(
                range(len(rows[row]) - length + left, len(rows[row]))
            )
            if want:
                assert torch.equal(entries[row, : len(want)], torch.stack(want))
    assert entries.shape[1] == 15 // every and part.bytes_after(15) == 15 // every * 8


def test_a_gradient_reaches_what_was_appended() -> None:
    part = Growing(shape=(), dtype=torch.float64)
    new = torch.randn(2, 4).double().requires_grad_()
    at = places(torch.zeros(2, dtype=torch.int64), None, 4)
    part.append(torch.zeros(2, 0).double(), new, at).square().sum().backward()
    assert torch.allclose(new.grad, 2 * new)  # type: ignore[arg-type]
