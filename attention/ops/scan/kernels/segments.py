"""How the Triton kernels of ``scan`` cut the tokens: sequences into segments, segments into chunks.

A program walks one segment, so that many programs share a long sequence. The states at the borders of the
segments lie in one buffer of slots, [slots, H, Dk, Dv] in float32; a sequence of n segments has n + 1:

    sequence      |------ 0 ------|-- 1 --|
    segment       |   0   |   1   |   2   |
    slot          0       1       2 3     4       segment i of sequence s lies between slots i + s, i + s + 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # segments times heads that are wanted, before a segment has more than one chunk
MOST = 8  # chunks of a segment


@dataclass(frozen=True)
class Segments:
    """count: segments, rows: sequences. chunk: tokens of a chunk, chunks: chunks of a segment. table [count,
    3], int32: slot, first token and end; offsets [rows + 1]: the segments before a sequence; bounds: the
    cu_seqlens. Those three are None where every sequence is a batch row of ``tokens`` tokens."""

    chunk: int
    chunks: int
    rows: int
    tokens: int
    count: int
    table: Tensor | None = None
    offsets: Tensor | None = None
    bounds: Tensor | None = None

    @property
    def each(self) -> int:
        """Segments of a batch row."""
        return self.count // max(1, self.rows)

    def whole(self) -> tuple[Any, ...]:
        """The arguments of :func:`sequence`."""
        return self.bounds, self.offsets, self.each, self.tokens

    def sizes(self) -> dict[str, int]:
        return {"C": self.chunk, "CHUNKS": self.chunks}

    def first(self) -> Tensor | slice:
        """The slots before the sequences' first tokens."""
        if self.offsets is None:
            return slice(None, None, self.each + 1)
        return self.offsets[:-1] + torch.arange(self.rows, device=self.offsets.device)

    def last(self) -> Tensor | slice:
        """The slots after the sequences' last tokens."""
        if self.offsets is None:
            return slice(self.each, None, self.each + 1)
        return self.offsets[1:] + torch.arange(self.rows, device=self.offsets.device)


def cut(v: Tensor, cu_seqlens: Tensor | None, chunk: int) -> Segments:
    """The segments of v [B, H, T, Dv]. Nothing is read back from the device."""
    b, h, t, _ = v.shape
    most = 32 if v.dtype == torch.float32 else 64  # float32 has no matrix unit, and fills the registers
    chunk = min(most, max(16, 1 << (chunk.bit_length() - 1)))
    wanted = triton.cdiv(b * h * triton.cdiv(t, chunk), PROGRAMS)
    chunks = min(MOST, 1 << max(0, wanted.bit_length() - 1))
    size = chunk * chunks
    if cu_seqlens is None:
        return Segments(chunk, chunks, b, t, b * triton.cdiv(t, size))
    bounds = cu_seqlens.to(v.device).long()
    rows = len(bounds) - 1
    count = t // size + rows  # at most
    offsets = torch.nn.functional.pad(((bounds.diff() + size - 1) // size).cumsum(0), (1, 0))
    one = torch.arange(count, device=v.device)
    row = torch.searchsorted(offsets[1:].contiguous(), one, right=True).clamp(max=rows - 1)
    begin = bounds[row] + (one - offsets[row]) * size
    end = torch.minimum(begin + size, bounds[row + 1])
    table = torch.stack((one + row, begin, end), 1).int()
    return Segments(chunk, chunks, rows, t, count, table, offsets, bounds)


def strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if x is None else (*x.stride(), 0)[:4]


@triton.jit
def segment(at, table, each, tokens, C: tl.constexpr, CHUNKS: tl.constexpr):
    """(slot before segment ``at``, batch row, first token, end); an end before the first: there is none."""
    if table is None:
        row = at // each
        begin = at % each * (C * CHUNKS)
        return (at + row).to(tl.int64), row.to(tl.int64), begin, tl.minimum(begin + C * CHUNKS, tokens)
    else:
        table += at * 3
        slot, begin, end = tl.load(table), tl.load(table + 1), tl.load(table + 2)
        return slot.to(tl.int64), (at * 0).to(tl.int64), begin, end


@triton.jit
def chunk_of(at, table, each, tokens, C: tl.constexpr, CHUNKS: tl.constexpr):
    """(batch row, first token, end of its segment) of chunk ``at``; an end before the first: there is
    none."""
    _slot, row, begin, end = segment(at // CHUNKS, table, each, tokens, C, CHUNKS)
    return row, begin + at % CHUNKS * C, end


@triton.jit
def sequence(row, bounds, offsets, each, tokens):
    """(first slot of sequence ``row``, batch row, first token, end)."""
    if bounds is None:
        return (row * (each + 1)).to(tl.int64), row.to(tl.int64), row * 0, row * 0 + tokens
    else:
        begin, end = tl.load(bounds + row).to(tl.int32), tl.load(bounds + row + 1).to(tl.int32)
        return tl.load(offsets + row) + row, (row * 0).to(tl.int64), begin, end


@triton.jit
def there(mask, row, mask_stride, token, end):
    """Which tokens there are: those before the end that are no padding."""
    real = token < end
    if mask is not None:
        real = real & (tl.load(mask + row * mask_stride[0] + token * mask_stride[1], mask=real, other=0) != 0)
    return real


@triton.jit
def load(x, row, head, token, col, stride, real, D: tl.constexpr):
    """x[row, head, token, col] as [tokens, columns], zeros where not ``real`` and past D."""
    x += row * stride[0] + head.to(tl.int64) * stride[1]
    place = token.to(tl.int64)[:, None] * stride[2] + col[None, :] * stride[3]
    return tl.load(x + place, mask=real[:, None] & (col < D)[None, :], other=0.0)


@triton.jit
def store(x, row, head, token, col, stride, real, value, D: tl.constexpr):
    x += row * stride[0] + head.to(tl.int64) * stride[1]
    place = token.to(tl.int64)[:, None] * stride[2] + col[None, :] * stride[3]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=real[:, None] & (col < D)[None, :])


@triton.jit
def load_each(x, row, head, token, stride, real):
    """x[row, head, token], float32, zeros where not ``real``."""
    x += row * stride[0] + head.to(tl.int64) * stride[1]
    return tl.load(x + token.to(tl.int64) * stride[2], mask=real, other=0.0).to(tl.float32)


@triton.jit
def head_decays(g, row, head, token, stride, real):
    """What a chunk's decays g[row, head, token] come to: (high, low) with p = high + low, p's float32
    rounding and the rest, exp(p), exp(r), exp of the sum (eager.py defines p and r).

    d_ij = p_i - p_j is exact to float32 with both parts: where p_i and p_j are close, high_i - high_j is.
    """
    each = tl.maximum(load_each(g, row, head, token, stride, real), -10000.0).to(tl.float64)  # exp is 0 there
    p, total = tl.cumsum(each, 0), tl.sum(each, 0)
    high = p.to(tl.float32)
    low = (p - high.to(tl.float64)).to(tl.float32)
    return high, low, tl.exp(high), tl.exp((total - p).to(tl.float32)), tl.exp(total.to(tl.float32))


@triton.jit
def between(high, low):
    """exp(d_ij) [C, C] of :func:`head_decays`; 1 above the diagonal."""
    d = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.minimum(d, 0.0))


@triton.jit
def channel_decays(g, row, head, token, col, stride, mask, mask_stride, end, last, D: tl.constexpr):
    """exp(p), exp(r) [tokens, columns] and exp of the sum [columns] of a chunk or a part of it that ends
    before token ``last``."""
    real = there(mask, row, mask_stride, token, end)
    following = token + 1
    later = there(mask, row, mask_stride, following, tl.minimum(end, last))
    each = load(g, row, head, token, col, stride, real, D).to(tl.float32)
    after = load(g, row, head, following, col, stride, later, D).to(tl.float32)
    before = tl.exp(tl.cumsum(each, 0))
    return before, tl.exp(tl.cumsum(after, 0, reverse=True)), tl.exp(tl.sum(each, 0))
