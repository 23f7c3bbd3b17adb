"""Where the rows of a batch begin and end, by the attention mask or the positions of a call.

mask 0 0 1 1 1 1: padding on the left, begins at 2
mask 1 1 1 1 0 0: padding on the right, ends at 4
mask 1 1 0 1 1 1: a hole, refused
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.errors import FarspanError

_HINT = (
    "Where generate() is given no mask, it makes one with a zero at every pad token of the prompt: pass "
    "attention_mask=torch.ones_like(input_ids) then."
)


@dataclass
class Padding:
    """Where rows begin: ``start`` [B] on the device and ``starts`` on the host, both None where no row is
    padded on the left. ends: where rows end, None where no row is padded on the right."""

    start: Tensor | None = None
    starts: list[int] | None = None
    ends: list[int] | None = None


def read_padding(mask: Tensor) -> Padding:
    """Where the rows of a 2-D mask [B, T] begin and end; a row without a token begins at T. Raises
    FarspanError for zeros between ones."""
    mask = mask.bool()
    if bool(mask.all()):
        return Padding()
    length = mask.shape[1]
    start, real = (mask.cumsum(1) == 0).sum(1), mask.sum(1)
    after = (mask.flip(1).cumsum(1) == 0).sum(1)
    end = torch.where(real > 0, length - after, length)
    holes = (real > 0) & (end - start != real)
    if bool(holes.any()):
        raise FarspanError(
            f"The attention mask has zeros between ones in row {int(holes.nonzero()[0])}: farspan serves "
            "padding on the left of a row, and on the right where every logit is asked for, not holes. "
            f"{_HINT}"
        )
    starts, ends = start.tolist(), end.tolist()
    left, right = any(starts), min(ends) < length
    return Padding(start if left else None, starts if left else None, ends if right else None)


def ends_by_positions(positions: Tensor, past: int) -> list[int] | None:
    """Where rows end, by positions [B, T] that count up by one and then stand still, as those of padding on
    the right do; ``past`` positions came before. None where no row does."""
    steps = (positions.diff(dim=1) == 1).long().cumprod(1).sum(1)  # by which each row counts up at first
    places = torch.arange(positions.shape[1], device=positions.device)
    still = ((positions == positions[:, -1:]) | (places <= steps[:, None])).all(1) & (steps > 0)
    end = torch.where(still, steps + 1, positions.shape[1])
    ends: list[int] = (past + end).tolist()
    return ends if min(ends) < past + positions.shape[1] else None


def refuse_right_padding(ends: list[int], evidence: str, why: str) -> FarspanError:
    """The error of a call that cannot have padding on the right. told: what says that there is some."""
    row = ends.index(min(ends))
    return FarspanError(
        f"{evidence} in row {row} (padding on the right), and {why}: pad on the left "
        f"(tokenizer.padding_side = 'left'). {_HINT}"
    )
