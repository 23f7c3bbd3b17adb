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
    """Windows [n, T] of consecutive tokens, apart into those that are trained on and those held out.

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
    count = len(ids) // size
    if count <= held_out:
        raise FarspanError(
            f"The text has {len(ids)} tokens, which are {count} windows of {size}; training with {held_out} "
            f"held out needs {held_out + 1} at least. Give more text, or a shorter window."
        )
    windows = ids[: count * size].view(count, size)
    apart = torch.linspace(0, count - 1, held_out + 2)[1:-1].round().long()
    kept = torch.ones(count, dtype=torch.bool)
    kept[apart] = False
    if most is not None and most < count - held_out:
        left = kept.nonzero()[:, 0]
        chosen = left[torch.linspace(0, len(left) - 1, most + 2)[1:-1].round().long()]
        train = windows[chosen]
    else:
        train = windows[kept]
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Windows(train, windows[apart], digest)
