"""64-bit hashes of text and of the bits of tensors, and which of several values differ from the others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def minority(column: Sequence[Any]) -> list[int]:
    """The places in ``column`` whose value is not the most frequent one. Where the first value is one of the
    most frequent, it counts as that one."""
    counts = Counter(column)
    highest = max(counts.values())
    frequent = column[0] if counts[column[0]] == highest else counts.most_common(1)[0][0]
    return [i for i, value in enumerate(column) if value != frequent]


def text_hash(text: str) -> int:
    """A 64-bit number (signed, as torch has it), the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


_PIECE = 1 << 18  # words hashed at a time: few enough for a CPU's cache


def bit_hash(x: Tensor) -> Tensor:
    """int64 scalar on x's device: the sum over 64-bit words of splitmix64(word + place * golden ratio),
    modulo 2^64. Equal bits in the same order give the same number on every device."""
    raw = x.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for begin in range(0, raw.numel(), 8 * _PIECE):
        piece = raw[begin : begin + 8 * _PIECE]
        words = torch.zeros(-(-piece.numel() // 8), dtype=torch.int64, device=x.device)
        words.view(torch.uint8)[: piece.numel()] = piece
        places = torch.arange(begin // 8, begin // 8 + words.numel(), device=x.device)
        total += _splitmix64(words + places * _signed(0x9E3779B97F4A7C15)).sum()
    return total


def _splitmix64(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # torch's shift keeps the sign


def _signed(word: int) -> int:
    return word - (1 << 64)
