"""Rounding keys and values to 8 or 4 bits (KIVI, arXiv:2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .errors import FarspanError
from .ops.int4_scores.storage import pack

OUTLIERS = 4  # key channels per KV head that are kept as they are, where any are


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How keys and values are rounded to ``bits``: a number is zero + scale * code, code 0 .. 2^bits - 1.

    Keys have a scale and a zero for each channel of ``group`` positions, which begin at multiples of
    ``group``; values for each position and ``of_value`` of their numbers (all where that does not divide
    them). Zero is the smallest number of the group, in the dtype of the model, so it is exact, and a group of
    equal numbers is, too. Scale is in that dtype as well, so that large keys in bfloat16 do not overflow. The
    error is about half a scale at most. Padding has no part in a group.
    window: at least so many of the last positions are kept as they are.
    Raises FarspanError for a group that is not a power of two from 16 to 256, and for a negative window.
    """

    bits: ClassVar[int]
    of_value: ClassVar[int]
    group: int
    window: int = 128

    def __post_init__(self) -> None:
        if self.group not in (16, 32, 64, 128, 256):
            raise FarspanError(
                f"int{self.bits} has groups of 16, 32, 64, 128 or 256 positions; got group={self.group}."
            )
        if self.window < 0:
            raise FarspanError(f"int{self.bits} takes a window of at least 0 tokens; got {self.window}.")

    def __str__(self) -> str:
        return f"int{self.bits}:group={self.group},window={self.window}"

    def value_group(self, value_dim: int) -> int:
        """Numbers of a value that share a scale."""
        return value_dim if value_dim % self.of_value else self.of_value

    def encode(self, k: Tensor, v: Tensor, valid: Tensor | None, channels: Tensor) -> tuple[Tensor, ...]:
        """Keys [B, Hkv, n, D] and values [B, Hkv, n, Dv] of whole groups -> what a store keeps of them: the
        first four tensors of ``Quantised.stored`` and its outliers.

        valid: [B, n] bool, False at padding, which has no part in the scale of a group; None: no padding.
        channels: [B, Hkv, 1, C] int64, the channels of keys that are kept as they are.
        """
        keys = k.unflatten(2, (-1, self.group))
        there = None if valid is None else valid.unflatten(1, (-1, self.group))[:, None, :, :, None]
        k_codes, k_steps = self._round(keys, 3, there)
        values = v.unflatten(3, (-1, self.value_group(v.shape[3])))
        v_codes, v_steps = self._round(values, 4, None)
        outliers = k.gather(3, channels.expand(-1, -1, k.shape[2], -1))
        return self._pack(k_codes.flatten(2, 3)), k_steps, self._pack(v_codes.flatten(3)), v_steps, outliers

    def _round(self, x: Tensor, dim: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes of x, and scale and zero of each group along ``dim``, side by side in the last dimension."""
        numbers = x.to(wide_of(x.dtype)).nan_to_num()  # padding may hold anything
        low, high = numbers, numbers
        if valid is not None:
            low, high = numbers.masked_fill(~valid, torch.inf), numbers.masked_fill(~valid, -torch.inf)
        low, high = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
        empty = low > high  # nothing but padding
        low, high = low.masked_fill(empty, 0), high.masked_fill(empty, 0)
        levels = 2**self.bits - 1
        eps = torch.finfo(x.dtype).eps
        # Rounded down, a coarse scale would cut off the largest numbers; rounded up, it would lift them on
        # average, which few levels show.
        scale = ((high - low) / levels * (1 + eps if levels * eps > 1 else 1)).to(x.dtype)
        codes = ((numbers - low) / torch.where(scale > 0, scale, 1).to(low.dtype)).add_(0.5)
        steps = torch.cat([scale.squeeze(dim), low.to(x.dtype).squeeze(dim)], -1)
        return codes.clamp_(0, levels).to(torch.uint8), steps

    def _pack(self, codes: Tensor) -> Tensor:
        if self.bits == 4 and codes.shape[-1] % 2:
            raise FarspanError(
                f"int4 packs two numbers into a byte, and the heads have {codes.shape[-1]}: use int8."
            )
        return codes if self.bits == 8 else pack(codes)


@dataclass(frozen=True, kw_only=True)
class Int8(Packing):
    """8 bits, in groups of 64 keys and of 128 numbers of a value: 0.53 of the bytes of bfloat16."""

    bits: ClassVar[int] = 8
    of_value: ClassVar[int] = 128
    group: int = 64


@dataclass(frozen=True, kw_only=True)
class Int4(Packing):
    """4 bits, in groups of 32 keys and of 32 numbers of a value: 0.31 of the bytes of bfloat16."""

    bits: ClassVar[int] = 4
    of_value: ClassVar[int] = 32
    group: int = 32


def unpack(codes: Tensor, bits: int, into: Tensor) -> Tensor:
    """Codes as numbers, written to ``into`` [..., D]."""
    if bits == 8:
        return into.copy_(codes)
    half = codes.shape[-1]
    into[..., :half], into[..., half:] = codes & 15, codes >> 4
    return into


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of ``dtype`` are rounded and decoded."""
    return torch.promote_types(dtype, torch.float32)
