"""The gradient of the decays in Triton.

exp(g_l) multiplies whatever passes from token l - 1 to token l. What the tokens from l on read (+) and write
(-) is counted in the gradients of q and k, which sum to the derivative with b_i = g_0 + .. + g_i:

    dg_l = sum_(i >= l) db_i,  db_i = q_i dq_i - k_i dk_i                    (summed over a head's channels)

Within a segment the sum is taken; what lies past its end is S . dS at its last border, so that rounding does
not add up over the sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import launch
from .recurrence import Tokens
from .segments import load, segment, store, strides, there


@triton.jit
def _decay_gradients(
    q, k, dq, dk, mask, state, dstate, dg, table,
    q_stride, k_stride, grad_stride, mask_stride, state_stride, dg_stride, each, tokens, group,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    slot, row, begin, end = segment(tl.program_id(0), table, each, tokens, C, CHUNKS)
    if begin >= end:
        return
    i, channel, col = tl.arange(0, C), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_V)
    border = (slot + 1) * state_stride[0] + h * state_stride[1] + channel[:, None] * state_stride[2]
    carried = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, DV, BLOCK_V):
        place = border + (at + col)[None, :]
        inside = (channel < D)[:, None] & (at + col < DV)[None, :]
        s = tl.load(state + place, mask=inside, other=0.0)
        carried += tl.sum(s * tl.load(dstate + place, mask=inside, other=0.0), 1)
    if not CHANNELS:
        past = tl.sum(carried, 0)
    count = tl.cdiv(end - begin, C)
    for step in range(count):
        token = begin + (count - 1 - step) * C + i
        real = there(mask, row, mask_stride, token, end)
        db = load(q, row, h // group, token, channel, q_stride, real, D).to(tl.float32) * load(
            dq, row, h, token, channel, grad_stride, real, D
        )
        db -= load(k, row, h // group, token, channel, k_stride, real, D).to(tl.float32) * load(
            dk, row, h, token, channel, grad_stride, real, D
        )
        if CHANNELS:
            found = tl.cumsum(db, 0, reverse=True) + carried[None, :]
            found = tl.where(real[:, None], found, 0.0)
            store(dg, row, h, token, channel, dg_stride, token < end, found, D)
            carried += tl.sum(db, 0)
        else:
            one = tl.sum(db, 1)
            found = tl.where(real, tl.cumsum(one, 0, reverse=True) + past, 0.0)
            place = dg + row * dg_stride[0] + h * dg_stride[1] + token.to(tl.int64) * dg_stride[2]
            tl.store(place, found.to(dg.dtype.element_ty), mask=token < end)
            past += tl.sum(one, 0)


def decay_gradients(
    tokens: Tokens, q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, state: Tensor, dstate: Tensor
) -> Tensor:
    """The gradient of tokens.log_decay, of dq and dk [B, H, T, Dk] in float32 and both states at the borders;
    dk: of what k writes, less that of what k reads."""
    segments, g, mask = tokens
    assert g is not None
    d, dv = state.shape[2:]
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    wide = launch.wide(d)
    block = min(64, wide) if tokens.by_channel else wide
    _decay_gradients[(segments.count, dq.shape[1], triton.cdiv(d, block))](
        q, k, dq, dk, mask, state, dstate, dg, segments.table,
        *map(strides, (q, k, dq, mask, state, dg)), segments.each, segments.tokens, dq.shape[1] // k.shape[1],
        D=d, DV=dv, BLOCK=block, BLOCK_V=32, CHANNELS=tokens.by_channel, **segments.sizes(), num_warps=4,
    )  # fmt: skip
    return dg
