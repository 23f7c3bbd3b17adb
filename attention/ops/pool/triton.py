"""``pool`` and ``pool_segments`` in Triton: one kernel, every mode asked for, x read once.

A program takes PIECES pieces (blocks or segments) of one KV head side by side, and walks through them
position by position: a thread keeps its own 16 bytes of D of one piece, so nothing is exchanged between
threads, and STEP loads are in flight at once. Sums are float32, in the order of the positions.

    positions      0 1 2 3 4 5 6 7 8 9        two segments, bounds 1, 4, 10
    segment 0        0 1 2                    turn of the walk in which a position is read
    segment 1              0 1 2 3 4 5
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch

_WARPS = 4
_TURN = _WARPS * 32 * 16  # bytes a program reads per position: 16 in each thread


def unsupported(x: Tensor, pieces: int | Tensor, **how: object) -> list[str]:
    return launch.cannot_read(x) + launch.no_gradient(x)


def pool(x: Tensor, block: int, *, modes: tuple[str, ...], start: Tensor | None) -> Tensor:
    return _launch(x, -(-x.shape[2] // block), modes, block=block, start=start)


def pool_segments(x: Tensor, bounds: Tensor, *, modes: tuple[str, ...]) -> Tensor:
    return _launch(x, bounds.shape[-1] - 1, modes, bounds=bounds)


def _launch(
    x: Tensor,
    count: int,
    modes: tuple[str, ...],
    *,
    block: int = 0,
    start: Tensor | None = None,
    bounds: Tensor | None = None,
) -> Tensor:
    b, h, t, d = x.shape
    out = torch.empty(b, h, count, len(modes) * d, dtype=x.dtype, device=x.device)
    pieces = max(1, _TURN // (launch.wide(d) * x.element_size()))
    at = {mode: place for place, mode in enumerate(modes)}
    _pool[(triton.cdiv(count, pieces), b * h)](
        x, out, bounds, start, *x.stride(),
        *((0, 0, 0) if bounds is None else bounds.stride()), 0 if start is None else start.stride(0),
        h, t, count, block,
        D=d, BD=launch.wide(d), PIECES=pieces, STEP=8, WIDTH=len(modes),
        MEAN=at.get("mean", -1), MIN=at.get("min", -1), MAX=at.get("max", -1),
        NORMALISED=at.get("length_normalised", -1),
        SEGMENTS=bounds is not None, PADDED=start is not None,
        num_warps=_WARPS,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["t", "count"])
def _pool(
    x, out, bounds, start, sxb, sxh, sxt, sxd, sbb, sbh, sbs, ss, h, t, count, block,
    D: tl.constexpr, BD: tl.constexpr, PIECES: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
    # where each mode's D columns go among the WIDTH, -1: nowhere
    MEAN: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, NORMALISED: tl.constexpr,
    SEGMENTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    batch, head = (tl.program_id(1) // h).to(tl.int64), (tl.program_id(1) % h).to(tl.int64)
    keep = piece < count
    if SEGMENTS:
        bounds += batch * sbb + head * sbh
        lo = tl.maximum(tl.load(bounds + piece * sbs, mask=keep, other=0), 0).to(tl.int32)
        hi = tl.minimum(tl.load(bounds + (piece + 1) * sbs, mask=keep, other=0), t).to(tl.int32)
    else:
        lo = piece * block
        if PADDED:
            lo += tl.load(start + batch * ss).to(tl.int32)
        hi = tl.where(keep, tl.minimum(lo + block, t), lo)
    length = tl.maximum(hi - lo, 0)  # [PIECES]

    d = tl.arange(0, BD)
    x += batch * sxb + head * sxh
    total = tl.zeros([PIECES, BD], tl.float32)
    low = tl.full([PIECES, BD], float("inf"), tl.float32)
    high = tl.full([PIECES, BD], float("-inf"), tl.float32)
    for begin in range(0, tl.max(length, 0), STEP):
        for turn in tl.static_range(STEP):
            inside = (begin + turn < length)[:, None]
            row = x + (lo + begin + turn).to(tl.int64)[:, None] * sxt
            tile = tl.load(row + d[None, :] * sxd, mask=inside & (d < D)[None, :], other=0.0).to(tl.float32)
            if (MEAN >= 0) | (NORMALISED >= 0):
                total += tile
            if MIN >= 0:
                low = tl.minimum(low, tl.where(inside, tile, float("inf")))
            if MAX >= 0:
                high = tl.maximum(high, tl.where(inside, tile, float("-inf")))

    seen = (length > 0)[:, None]
    mask = keep[:, None] & (d < D)[None, :]
    first = (tl.program_id(1).to(tl.int64) * count + piece)[:, None] * (WIDTH * D) + d[None, :]
    mean = total / tl.maximum(length, 1).to(tl.float32)[:, None]
    if MEAN >= 0:
        tl.store(out + first + MEAN * D, mean.to(out.dtype.element_ty), mask=mask)
    if NORMALISED >= 0:
        scaled = mean * tl.sqrt(length.to(tl.float32))[:, None]
        tl.store(out + first + NORMALISED * D, scaled.to(out.dtype.element_ty), mask=mask)
    if MIN >= 0:
        tl.store(out + first + MIN * D, tl.where(seen, low, 0.0).to(out.dtype.element_ty), mask=mask)
    if MAX >= 0:
        tl.store(out + first + MAX * D, tl.where(seen, high, 0.0).to(out.dtype.element_ty), mask=mask)
