"""The delta rule in Triton: what each token writes, x_i = beta_i (v_i - A_i^T k_i), so that the rest is the
recurrence of recurrence.py with x for v.

Inside a chunk x solves a unit triangular system, x = t (beta (v - exp(p) k S)), t = (1 + m)^-1 with m_ij =
beta_i exp(d_ij) (k_i . k_j) for j < i. ``_solve`` computes, chunk by chunk, what does not need the state,

    u = t (beta v),  w = t (beta exp(p) k),        and then ``_sweep``, in order:  x = u - w S

In the backward the gradient of x obeys the same rule from the last token to the first, with the system's
transpose: dx = u' - w' dS with

    u' = t^T (what do_i reads of x_j in the chunk),  w' = -t^T (exp(r) k)

and the state's gradient is written to by do through q, and by z = -beta dx (what x_i reads) through k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import launch
from .recurrence import Tokens, config, first_states
from .segments import (
    between,
    chunk_of,
    head_decays,
    load,
    load_each,
    sequence,
    store,
    strides,
    there,
)


@triton.jit
def _solve(
    q, k, v, g, beta, mask, u, w, table,
    q_stride, k_stride, v_stride, g_stride, beta_stride, mask_stride, u_stride, w_stride,
    each, tokens, group, scale,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    C: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    row, first, end = chunk_of(tl.program_id(0), table, each, tokens, C, CHUNKS)
    if first >= end:
        return
    i, channel, col = tl.arange(0, C), tl.arange(0, WIDE), tl.arange(0, BLOCK)
    token = first + i
    real = there(mask, row, mask_stride, token, end)
    valid = token < end
    key = load(k, row, h // group, token, channel, k_stride, real, D)
    strength = load_each(beta, row, h, token, beta_stride, real)
    m = tl.dot(key, tl.trans(key), input_precision="ieee") * strength[:, None]
    ratio = tl.full((C, C), 1.0, tl.float32)
    if g is not None:
        high, low, before, after, _total = head_decays(g, row, h, token, g_stride, real)
        ratio = between(high, low)
    m = tl.where(i[:, None] > i[None, :], m * ratio, 0.0)
    t = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for n in range(1, C):  # row n of the inverse, of the rows above it
        weights = tl.sum(tl.where(i[:, None] == n, m, 0.0), 0)
        t -= tl.where(i[:, None] == n, tl.sum(weights[:, None] * t, 0)[None, :], 0.0)
    # The diagonal of ones is left out of the products, which round their operands: it is most of x.
    t = tl.where(i[:, None] == i[None, :], 0.0, t)
    if REVERSE:
        t = tl.trans(t)
        query = load(q, row, h // group, token, channel, q_stride, real, D)
        reads = tl.dot(key, tl.trans(query), input_precision="ieee") * scale  # [j, i]
        if g is not None:
            reads = reads * tl.trans(ratio)
        reads = tl.where(i[:, None] <= i[None, :], reads, 0.0).to(key.dtype)
        of_k = tl.full((C,), -1.0, tl.float32)
        if g is not None:
            of_k = -after
    else:
        of_k = strength
        if g is not None:
            of_k = of_k * before
    for at in range(0, DV, BLOCK):
        value = load(v, row, h, token, at + col, v_stride, real, DV)
        if REVERSE:
            own = tl.dot(reads, value, input_precision="ieee")
            own += tl.dot(t.to(key.dtype), own.to(key.dtype), input_precision="ieee")
        else:
            own = value.to(tl.float32) * strength[:, None]
            own += tl.dot((t * strength[None, :]).to(key.dtype), value, input_precision="ieee")
        store(u, row, h, token, at + col, u_stride, valid, own, DV)
    t = (t * of_k[None, :]).to(key.dtype)
    for at in range(0, D, BLOCK):
        some = load(k, row, h // group, token, at + col, k_stride, real, D)
        own = some.to(tl.float32) * of_k[:, None] + tl.dot(t, some, input_precision="ieee")
        store(w, row, h, token, at + col, w_stride, valid, own, D)


@triton.jit(do_not_specialize=["bucket"])
def _sweep(
    q, k, do, g, beta, mask, u, w, x, state, bounds, offsets,
    q_stride, k_stride, do_stride, g_stride, beta_stride, mask_stride, u_stride, w_stride, x_stride,
    state_stride, each, tokens, group, scale,
    bucket,  # of the tokens; only a key of the tuning
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, CHUNKS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """x, and the states at the borders, from the first of them (REVERSE: the last)."""
    h = tl.program_id(1)
    slot, row, begin, end = sequence(tl.program_id(0), bounds, offsets, each, tokens)
    i, channel = tl.arange(0, C), tl.arange(0, WIDE)
    col = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    state += slot * state_stride[0] + h * state_stride[1]
    state += channel[:, None] * state_stride[2] + col[None, :] * state_stride[3]
    inside = (channel < D)[:, None] & (col < DV)[None, :]
    count = tl.cdiv(end - begin, C)
    if REVERSE:
        s = tl.load(state + tl.cdiv(count, CHUNKS) * state_stride[0], mask=inside, other=0.0)
    else:
        s = tl.load(state, mask=inside, other=0.0)
    for step in range(count):
        n = step
        if REVERSE:
            n = count - 1 - step
        token = begin + n * C + i
        real = there(mask, row, mask_stride, token, end)
        key = load(k, row, h // group, token, channel, k_stride, real, D)
        kept = load(w, row, h, token, channel, w_stride, real, D)
        write = load(u, row, h, token, col, u_stride, real, DV).to(tl.float32)
        write -= tl.dot(kept, s.to(kept.dtype), input_precision="ieee")
        store(x, row, h, token, col, x_stride, token < end, write, DV)
        total = 1.0
        if g is not None:
            _high, _low, before, after, total = head_decays(g, row, h, token, g_stride, real)
        s = s * total
        if REVERSE:
            write = -load_each(beta, row, h, token, beta_stride, real)[:, None] * write
            query = load(q, row, h // group, token, channel, q_stride, real, D)
            grad = load(do, row, h, token, col, do_stride, real, DV).to(tl.float32) * scale
            if g is not None:
                write, grad = write * before[:, None], grad * before[:, None]
            s += tl.dot(tl.trans(query), grad.to(query.dtype), input_precision="ieee")
        else:
            if g is not None:
                write = write * after[:, None]
        s += tl.dot(tl.trans(key), write.to(key.dtype), input_precision="ieee")
        if REVERSE:
            if n % CHUNKS == 0:
                tl.store(state + n // CHUNKS * state_stride[0], s, mask=inside)
        else:
            if ((n + 1) % CHUNKS == 0) | (n == count - 1):
                tl.store(state + (n // CHUNKS + 1) * state_stride[0], s, mask=inside)


_KEY = ["D", "DV", "C", "CHUNKS", "REVERSE", "bucket"]
_half = launch.tuned([config(32, 4, 2), config(64, 4, 2), config(16, 4, 3)], _KEY)(_sweep)
_widest = launch.tuned([config(32, 8, 1), config(16, 8, 2)], _KEY)(_sweep)
_single = launch.tuned([config(16, 8, 1), config(32, 8, 1)], _KEY)(_sweep)


def writes(
    tokens: Tokens,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor | None,
    *,
    q: Tensor | None = None,
    scale: float = 1.0,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [B, H, T, Dv] in the dtype of v and the states at the borders, of values v and the states [rows, H,
    Dk, Dv] before the first token. In reverse: dx in float32 and the states' gradients, of v = do, q, and the
    gradient after the last token."""
    segments, g, mask = tokens
    b, h, t, dv = v.shape
    d, group = k.shape[3], h // k.shape[1]
    wide = launch.wide(d)
    borders = first_states(segments, state, h, d, dv, k.device, reverse)
    u = torch.empty(b, h, t, dv, dtype=torch.float32, device=v.device)
    # a gradient is rounded where it ends
    x = torch.empty_like(u, dtype=torch.float32 if reverse else v.dtype)
    w = torch.empty(b, h, t, d, dtype=k.dtype, device=k.device)
    fixed = {"D": d, "DV": dv, "WIDE": wide, "REVERSE": reverse, **segments.sizes()}
    warps = 8 if k.dtype == torch.float32 else 4
    _solve[(segments.count * segments.chunks, h)](
        q, k, v, g, beta, mask, u, w, segments.table, *map(strides, (q, k, v, g, beta, mask, u, w)),
        segments.each, segments.tokens, group, float(scale), BLOCK=32, **fixed, num_warps=warps,
    )  # fmt: skip

    def grid(args: dict[str, int]) -> tuple[int, int, int]:
        return segments.rows, h, triton.cdiv(dv, args["BLOCK_V"])

    kernel = _single if k.dtype == torch.float32 else _widest if wide > 128 else _half
    kernel[grid](
        q, k, v, g, beta, mask, u, w, x, borders, segments.bounds, segments.offsets,
        *map(strides, (q, k, v, g, beta, mask, u, w, x, borders)),
        segments.each, segments.tokens, group, float(scale), launch.bucket(t), **fixed,
    )  # fmt: skip
    return x, borders
