"""Labels of Double Sparsity in 4 or 2 bits (arXiv:2408.07092)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.scores import scores
from ..softmax import Softmax
from ..sources import Source, Sources
from ..summary import Channels

BITS = (4, 2)
_STEPS = 4  # bytes of the zero and the scale of a label, in bfloat16
_AT_ONCE = 1 << 14  # labels of a head that are decoded at a time


@dataclass(frozen=True)
class RoundedChannels:
    """The labels ``channels``, each rounded to ``bits`` bits a number, as bytes [B, Hkv, T, width].

    A number is zero + scale * code with code 0 .. 2^bits - 1, and each key has a zero, the smallest number of
    its label, and a scale, both in bfloat16, whose range is that of float32.
    """

    channels: Channels
    bits: int
    block: ClassVar[None] = None
    dtype: ClassVar[torch.dtype] = torch.uint8
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"keys"})

    @property
    def key(self) -> tuple:
        return ("rounded", self.bits, *self.channels.key)

    def width(self, head_dim: int) -> int:
        return label_bytes(self.channels.width(head_dim), self.bits)

    def on(self, device: torch.device, group: int = 1) -> Tensor:
        """As ``Channels.on``."""
        return self.channels.on(device, group)

    def compute(self, x: Sources) -> Tensor:
        labels, levels = self.channels.compute(x).float(), 2**self.bits - 1
        zero = labels.amin(-1, keepdim=True).bfloat16()
        scale = ((labels.amax(-1, keepdim=True) - zero) / levels).bfloat16()
        codes = ((labels - zero) / torch.where(scale > 0, scale, 1)).round().clamp(0, levels).byte()
        return torch.cat([torch.cat([zero, scale], -1).view(torch.uint8), self._packed(codes)], -1)

    def scores(self, q: Tensor, entries: Tensor, softmax: Softmax) -> Tensor:
        """``ops.scores`` of queries' labels q [B, H, Tq, r] and ``entries`` [B, Hkv, N, width], which are
        decoded a part at a time."""
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        parts = [self.decoded(part, q) for part in entries.split(_AT_ONCE, 2)]
        return torch.cat([scores(q, part, softmax) for part in parts], -1)

    def decoded(self, entries: Tensor, q: Tensor) -> Tensor:
        """The labels [B, Hkv, N, r] of ``entries``, in the dtype of q [B, H, Tq, r]."""
        zero, scale = entries[..., :_STEPS].contiguous().view(torch.bfloat16).to(q.dtype).chunk(2, -1)
        shifts = range(0, 8, self.bits)
        codes = torch.cat([entries[..., _STEPS:] >> shift for shift in shifts], -1) & (2**self.bits - 1)
        return zero + scale * codes[..., : q.shape[3]].to(q.dtype)

    def _packed(self, codes: Tensor) -> Tensor:
        """codes [..., r] uint8 -> [..., ceil(r * bits / 8)]; byte i holds the codes i, i + that, ..."""
        size = label_bytes(codes.shape[-1], self.bits) - _STEPS
        filled = torch.nn.functional.pad(codes, (0, size * 8 // self.bits - codes.shape[-1]))
        parts = filled.split(size, -1)
        packed = parts[0]
        for i, part in enumerate(parts[1:], 1):
            packed = packed | (part << i * self.bits)
        return packed


def label_bytes(numbers: int, bits: int) -> int:
    """Bytes of a label of so many numbers."""
    return _STEPS + -(-numbers * bits // 8)
