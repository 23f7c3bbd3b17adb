"""Inside a chunk whose channels decay, in Triton: the pairs exp(d_ij) q_i k_j, summed over the channels, and
their gradients.

A chunk is cut into parts of 16 tokens. Between two parts, exp(d_ij) is a product: exp(r_j) to the end of the
earlier part, the parts between, exp(p_i) from the begin of the later one; each is at most 1, so none
overflows, and the sums over channels are matrix products. Within a part the exponents are added up token by
token. No exponent is a difference of sums (see eager.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import launch
from .recurrence import Tokens
from .segments import channel_decays, chunk_of, load, store, strides, there

_PART = tl.constexpr(16)


@triton.jit
def _row(x, row, head, token, channel, stride, real, D: tl.constexpr):
    """x[row, head, token, :] of one token, float32."""
    x += row * stride[0] + head.to(tl.int64) * stride[1] + token.to(tl.int64) * stride[2]
    return tl.load(x + channel * stride[3], mask=real & (channel < D), other=0.0).to(tl.float32)


@triton.jit
def _part(
    x, g, mask, row, x_head, head, first, channel, x_stride, g_stride, mask_stride, end, D: tl.constexpr
):
    """A part from token ``first`` on: its tokens, which of them there are, x[row, x_head] of them, and their
    :func:`channel_decays`."""
    token = first + tl.arange(0, _PART)
    real = there(mask, row, mask_stride, token, end)
    value = load(x, row, x_head, token, channel, x_stride, real, D)
    before, after, total = channel_decays(
        g, row, head, token, channel, g_stride, mask, mask_stride, end, first + _PART, D
    )
    return token, real, value, before, after, total


@triton.jit
def _pairs(
    q, k, g, mask, pairs, table, q_stride, k_stride, g_stride, mask_stride, pairs_stride, each, tokens, group,
    D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """pairs[token i, j] for i of one part of a chunk."""
    h = tl.program_id(1)
    row, first, end = chunk_of(tl.program_id(0), table, each, tokens, C, CHUNKS)
    part = tl.program_id(2)
    at = first + part * _PART
    if at >= end:
        return
    i, channel = tl.arange(0, _PART), tl.arange(0, WIDE)
    token = at + i
    real = there(mask, row, mask_stride, token, end)
    query = load(q, row, h // group, token, channel, q_stride, real, D)
    decay = load(g, row, h, token, channel, g_stride, real, D).to(tl.float32)
    here = query.to(tl.float32)
    gap = tl.zeros((_PART, WIDE), tl.float32)  # d_ij of each channel
    own = tl.zeros((_PART, _PART), tl.float32)
    for back in range(_PART):
        j = _PART - 1 - back
        at_j = tl.zeros((1,), tl.int32) + at + j
        one = there(mask, row, mask_stride, at_j, end)
        key = _row(k, row, h // group, at_j, channel, k_stride, one, D)
        sums = tl.sum(here * key[None, :] * tl.exp(gap), 1)
        own = tl.where((i[None, :] == j) & (i[:, None] >= j), sums[:, None], own)
        gap += tl.where((i >= j)[:, None], _row(g, row, h, at_j, channel, g_stride, one, D)[None, :], 0.0)
    pairs += row * pairs_stride[0] + h * pairs_stride[1]
    pairs += token.to(tl.int64)[:, None] * pairs_stride[2] + i[None, :]
    valid = (token < end)[:, None] & (i >= 0)[None, :]
    tl.store(pairs + part * _PART, own.to(pairs.dtype.element_ty), mask=valid)
    far = here * tl.exp(tl.cumsum(decay, 0))
    for back in range(part):
        earlier = part - 1 - back
        _token, _real, key, _before, after, total = _part(
            k, g, mask, row, h // group, h, first + earlier * _PART, channel, k_stride, g_stride, mask_stride,
            end, D,
        )  # fmt: skip
        a = tl.dot(far.to(query.dtype), tl.trans((key * after).to(query.dtype)), input_precision="ieee")
        tl.store(pairs + earlier * _PART, a.to(pairs.dtype.element_ty), mask=valid)
        far = far * total[None, :]


def pairs(tokens: Tokens, q: Tensor, k: Tensor, heads: int) -> Tensor:
    """[B, H, T, C] in the dtype of k: exp(d_ij) q_i . k_j of token i and token j of its chunk, j <= i. What
    lies above the diagonal is not written."""
    segments, g, mask = tokens
    b, _, t, d = k.shape
    made = torch.empty(b, heads, t, segments.chunk, dtype=k.dtype, device=k.device)
    _pairs[(segments.count * segments.chunks, heads, segments.chunk // 16)](
        q, k, g, mask, made, segments.table, *map(strides, (q, k, g, mask, made)),
        segments.each, segments.tokens, heads // k.shape[1],
        D=d, WIDE=launch.wide(d), **segments.sizes(), num_warps=4,
    )  # fmt: skip
    return made


@triton.jit
def _products(
    x, y, mask, out, table, x_stride, y_stride, mask_stride, out_stride, each, tokens,
    D: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out[token i, j] = x_i . y_j over a chunk, float32."""
    h = tl.program_id(1)
    row, first, end = chunk_of(tl.program_id(0), table, each, tokens, C, CHUNKS)
    if first >= end:
        return
    i, channel = tl.arange(0, C), tl.arange(0, WIDE)
    token = first + i
    real = there(mask, row, mask_stride, token, end)
    a = load(x, row, h, token, channel, x_stride, real, D)
    b = load(y, row, h, token, channel, y_stride, real, D)
    store(out, row, h, token, i, out_stride, token < end, tl.dot(a, tl.trans(b), input_precision="ieee"), C)


@triton.jit
def _pairs_backward(
    q, k, g, mask, dpairs, dq, dk, table,
    q_stride, k_stride, g_stride, mask_stride, dpairs_stride, grad_stride, each, tokens, group,
    D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dq and dk, some channels, of the tokens of one part: as queries of the parts before, as keys of those
    after."""
    parts: tl.constexpr = C // _PART
    h = tl.program_id(1)
    row, first, end = chunk_of(tl.program_id(0), table, each, tokens, C, CHUNKS)
    part, tile = tl.program_id(2) % parts, tl.program_id(2) // parts
    at = first + part * _PART
    if at >= end:
        return
    i, channel = tl.arange(0, _PART), tile * BLOCK + tl.arange(0, BLOCK)
    token, real, query, before, after, _total = _part(
        q, g, mask, row, h // group, h, at, channel, q_stride, g_stride, mask_stride, end, D
    )
    kind = query.dtype
    weights = dpairs + row * dpairs_stride[0] + h * dpairs_stride[1]

    grad_q = tl.zeros((_PART, BLOCK), tl.float32)  # of the parts before, the nearest first
    between = tl.full((BLOCK,), 1.0, tl.float32)
    for back in range(part):
        earlier = part - 1 - back
        _token, real_j, key_j, _before, after_j, total = _part(
            k, g, mask, row, h // group, h, first + earlier * _PART, channel, k_stride, g_stride, mask_stride,
            end, D,
        )  # fmt: skip
        w = tl.load(
            weights + token.to(tl.int64)[:, None] * dpairs_stride[2] + earlier * _PART + i[None, :],
            mask=real[:, None] & real_j[None, :], other=0.0,
        )  # fmt: skip
        far = (key_j * after_j * between[None, :]).to(kind)
        grad_q += tl.dot(w.to(kind), far, input_precision="ieee")
        between = between * total
    grad_q = grad_q * before

    grad_k = tl.zeros((_PART, BLOCK), tl.float32)  # of the parts after
    between = tl.full((BLOCK,), 1.0, tl.float32)
    for later in range(part + 1, parts):
        token_j, real_j, query_j, before_j, _after, total = _part(
            q, g, mask, row, h // group, h, first + later * _PART, channel, q_stride, g_stride, mask_stride,
            end, D,
        )  # fmt: skip
        w = tl.load(
            weights + token_j.to(tl.int64)[None, :] * dpairs_stride[2] + part * _PART + i[:, None],
            mask=real[:, None] & real_j[None, :], other=0.0,
        )  # fmt: skip
        far = (query_j * before_j * between[None, :]).to(kind)
        grad_k += tl.dot(w.to(kind), far, input_precision="ieee")
        between = between * total
    grad_k = grad_k * after

    gap = tl.zeros((_PART, BLOCK), tl.float32)
    for back in range(_PART):  # token j as a key of this part's later tokens
        j = _PART - 1 - back
        at_j = tl.zeros((1,), tl.int32) + at + j
        one = there(mask, row, mask_stride, at_j, end)
        w = tl.load(
            weights + token.to(tl.int64) * dpairs_stride[2] + part * _PART + j, mask=real & one & (i > j),
            other=0.0,
        )  # fmt: skip
        key_j = _row(k, row, h // group, at_j, channel, k_stride, one, D)
        grad_q += w[:, None] * key_j[None, :] * tl.exp(gap)
        gap += tl.where((i >= j)[:, None], _row(g, row, h, at_j, channel, g_stride, one, D)[None, :], 0.0)
    gap = tl.zeros((_PART, BLOCK), tl.float32)
    for j in range(_PART):  # as a query of the earlier ones
        at_j = tl.zeros((1,), tl.int32) + at + j
        one = there(mask, row, mask_stride, at_j, end)
        gap += tl.where((i < j)[:, None], _row(g, row, h, at_j, channel, g_stride, one, D)[None, :], 0.0)
        w = tl.load(
            weights + at_j.to(tl.int64) * dpairs_stride[2] + part * _PART + i, mask=real & one & (i < j),
            other=0.0,
        )  # fmt: skip
        query_j = _row(q, row, h // group, at_j, channel, q_stride, one, D)
        grad_k += w[:, None] * query_j[None, :] * tl.exp(gap)
    store(dq, row, h, token, channel, grad_stride, token < end, grad_q, D)
    store(dk, row, h, token, channel, grad_stride, token < end, grad_k, D)


def pairs_backward(tokens: Tokens, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """dq and dk of the pairs i > j inside the chunks [B, H, T, Dk], float32 and less the scale, for gradients
    do_i . v_j of the pairs."""
    segments, g, mask = tokens
    b, h, t, dv = v.shape
    d = k.shape[3]
    programs = segments.count * segments.chunks
    dpairs = torch.empty(b, h, t, segments.chunk, dtype=torch.float32, device=v.device)
    _products[(programs, h)](
        dout, v, mask, dpairs, segments.table, *map(strides, (dout, v, mask, dpairs)),
        segments.each, segments.tokens, D=dv, WIDE=launch.wide(dv), **segments.sizes(), num_warps=4,
    )  # fmt: skip
    dq, dk = (torch.empty(b, h, t, d, dtype=torch.float32, device=v.device) for _ in range(2))
    block = min(64, launch.wide(d))
    _pairs_backward[(programs, h, segments.chunk // 16 * triton.cdiv(d, block))](
        q, k, g, mask, dpairs, dq, dk, segments.table, *map(strides, (q, k, g, mask, dpairs, dq)),
        segments.each, segments.tokens, h // k.shape[1],
        D=d, WIDE=launch.wide(d), BLOCK=block, **segments.sizes(), num_warps=4,
    )  # fmt: skip
    return dq, dk
