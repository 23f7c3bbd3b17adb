"""The windows of a text: which are trained on, in which order, and which are held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.errors import FarspanError


@dataclass(frozen=True)
class Windows:
    """Windows [n, T] of consecutive tokens, split into those that are trained on and those held out.

    sha256: the first 16 hex digits of a hash of the text.
    """

    train: Tensor
    held_out: Tensor
    sha256: str

    @property
    def size(self) -> int:
        """T, the tokens of a window."""
        return self.train.shape[1]

    def of_step(self, step: int, batch: int, seed: int) -> Tensor:
        """The windows [batch, T] of a step. Every pass over the text has an order of its own, which follows
        from ``seed`` and the number of the pass alone, so a resumed training meets the same windows."""
        first, count = step * batch, self.train.shape[0]
        places = []
        for at in range(first, first + batch):
            order = torch.Generator().manual_seed(seed * 1_000_003 + at // count)
            places.append(int(torch.randperm(count, generator=order)[at % count]))
        return self.train[places]


def cut_windows(tokenizer: Any, text: str, size: int, held_out: int, most: int | None = None) -> Windows:
    """Cut the tokens of ``text`` into windows of ``size`` tokens and hold ``held_out`` of them out, evenly
    spaced over the text. most: train on that many of the others at most, evenly spaced, too.

    Raises FarspanError for a text too short for one window more than that."""
    if size < 64:
        raise FarspanError(f"Training needs windows of at least 64 tokens; got {size}.")
    if most is not None and most < 1:
        raise FarspanError(f"Training needs 1 window at least; got windows={most}.")
    if held_out < 1:
        raise FarspanError(f"At least 1 window must be held out to judge training; got {held_out}.")
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    first = getattr(tokenizer, "bos_token_id", None)
    begins = first is not None and len(ids) > 0 and int(ids[0]) == first  # then every window begins so
    body, room = (ids[1:], size - 1) if begins else (ids, size)
    count = len(body) // room
    if count <= held_out:
        raise FarspanError(
            f"The text has {len(ids)} tokens, which are {count} windows of {size}; training with {held_out} "
            f"held out needs {held_out + 1} at least. Give more text, or a shorter window."
        )
    windows = body[: count * room].view(count, room)
    if begins:
        windows = torch.cat([ids[:1].expand(count, 1), windows], 1)
    apart = _spread(held_out, count)
    kept = torch.ones(count, dtype=torch.bool)
    kept[apart] = False
    left = kept.nonzero()[:, 0]
    if most is not None and most < len(left):
        left = left[_spread(most, len(left))]
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Windows(windows[left], windows[apart], digest)


def _spread(count: int, total: int) -> Tensor:
    """``count`` different ones of the numbers 0 .. total - 1, evenly spaced."""
    return (torch.arange(count) * 2 + 1) * total // (2 * count)
