"""Find where the rows of a batch begin and end, by the attention mask or the positions of a call.

mask 0 0 1 1 1 1: padding on the left, begins at 2
mask 1 1 1 1 0 0: padding on the right, ends at 4
mask 1 1 0 1 1 1: a hole, refused
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.errors import FarspanError

_HINT = (
    "If generate() is called without a mask, it sets the mask to 0 at every pad token of the prompt: pass "
    "attention_mask=torch.ones_like(input_ids) in this case."
)


@dataclass
class Padding:
    """The padding of the rows of a batch.

    start, starts: the positions at which rows begin, [B] on the device and a list on the host; None where no
    row is padded on the left. ends: the positions at which rows end; None where no row is padded on the
    right.
    """

    start: Tensor | None = None
    starts: list[int] | None = None
    ends: list[int] | None = None


def checked_2d(mask: Any, taker: str = "farspan", advice: str = "") -> Tensor:
    """``mask``. Raises FarspanError unless it is a 2-D tensor. taker, advice: how the sentence of the error
    begins and ends."""
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    shape = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
    raise FarspanError(
        f"{taker} takes a 2-D attention mask (rows, positions), which marks padding; got a {shape} "
        f"one{advice}."
    )


def read_padding(mask: Tensor) -> Padding:
    """The padding of a 2-D mask [B, T]. A row without a token begins at T. Raises FarspanError for zeros
    between ones."""
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
            f"The attention mask has zeros between ones in row {int(holes.nonzero()[0])}; farspan serves "
            "padding on the left of a row, and on the right where the logits of every position are returned. "
            f"{_HINT}"
        )
    starts, ends = start.tolist(), end.tolist()
    left, right = any(starts), min(ends) < length
    return Padding(start if left else None, starts if left else None, ends if right else None)


def ends_by_positions(positions: Tensor, past: int) -> list[int] | None:
    """The positions at which rows end, by position ids [B, T]. In padding on the right, the ids no longer
    count up by one, but repeat the last id. ``past`` positions came before. None where no row has such
    padding."""
    # how often a row counts up at its beginning
    steps = (positions.diff(dim=1) == 1).long().cumprod(1).sum(1)
    places = torch.arange(positions.shape[1], device=positions.device)
    still = ((positions == positions[:, -1:]) | (places <= steps[:, None])).all(1) & (steps > 0)
    end = torch.where(still, steps + 1, positions.shape[1])
    ends: list[int] = (past + end).tolist()
    return ends if min(ends) < past + positions.shape[1] else None


def refuse_right_padding(ends: list[int], evidence: str, why: str) -> FarspanError:
    """The error for a call that cannot have padding on the right. evidence: how the padding was found. why:
    why the call cannot have it."""
    row = ends.index(min(ends))
    return FarspanError(
        f"{evidence} in row {row} (padding on the right), and {why}: pad on the left "
        f"(tokenizer.padding_side = 'left'). {_HINT}"
    )
