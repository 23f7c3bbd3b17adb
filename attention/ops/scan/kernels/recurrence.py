"""The linear recurrence in Triton: states at the borders of the segments, then every segment's outputs.

    _walk without out    each segment on its own, from a state of zeros: what it adds
    _carry               from border to border
    _walk with out       each segment from its border: its outputs

Its gradients are recurrences of the same form. With dS the gradient of the state, which runs backward,

    dv_j = sum_(i >= j) exp(d_ij) (k_j . q_i) scale do_i + exp(r_j) dS^T k_j      reverse:   (k, q, do)
    dq_i = scale (sum_(j <= i) exp(d_ij) (do_i . v_j) k_j + exp(p_i) S do_i)      forward:  (do, v, k), S^T
    dk_j = sum_(i >= j) exp(d_ij) (v_j . do_i) scale q_i + exp(r_j) dS v_j        reverse:  (v, do, q), dS^T

so that one kernel serves them all: REVERSE walks from the last token to the first, and a transposed state
has its strides swapped. KIND says what decays: a head, the channels of q and k (key) or, in dq and dk
of that, the channels of v (value); inside a chunk, channels.py computes the last two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import launch
from .segments import (
    Segments,
    between,
    channel_decays,
    head_decays,
    load,
    segment,
    sequence,
    store,
    strides,
    there,
)


class Tokens(NamedTuple):
    """What every kernel reads beside its operands."""

    segments: Segments
    log_decay: Tensor | None
    mask: Tensor | None

    @property
    def by_channel(self) -> bool:
        return self.log_decay is not None and self.log_decay.dim() == 4


@triton.jit
def _walk(
    q, k, v, g, mask, pairs, extra, state, decays, out, table,
    q_stride, k_stride, v_stride, g_stride, mask_stride, pairs_stride, extra_stride, state_stride, out_stride,
    each, tokens, q_group, k_group, v_group, scale, v_scale,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, CHUNKS: tl.constexpr,
    KIND: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """out = scale * (what q reads of the state + what it reads in the chunk), for v_scale * v; STRICT: a
    token does not read itself. Without out: the state after the segment, and its decay."""
    at, h = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    slot, row, begin, end = segment(at, table, each, tokens, C, CHUNKS)
    if begin >= end:
        return
    i, channel = tl.arange(0, C), tl.arange(0, WIDE)
    col = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    state += slot * state_stride[0] + h * state_stride[1]
    state += channel[:, None] * state_stride[2] + col[None, :] * state_stride[3]
    inside = (channel < D)[:, None] & (col < DV)[None, :]
    source, target = state, state + state_stride[0]
    if REVERSE:
        source, target = target, source
    s = tl.zeros((WIDE, BLOCK_V), tl.float32) if out is None else tl.load(source, mask=inside, other=0.0)
    whole = 1.0
    if KIND == "key":
        whole = tl.full((WIDE,), 1.0, tl.float32)
    count = tl.cdiv(end - begin, C)
    for step in range(count):
        first = begin + step * C
        if REVERSE:
            first = begin + (count - 1 - step) * C
        token = first + i
        real = there(mask, row, mask_stride, token, end)
        key = load(k, row, h // k_group, token, channel, k_stride, real, D)
        value = load(v, row, h // v_group, token, col, v_stride, real, DV)
        if g is None:
            total = 1.0
        elif KIND == "head":
            high, low, before, after, total = head_decays(g, row, h, token, g_stride, real)
        elif KIND == "key":
            before, after, total = channel_decays(
                g, row, h, token, channel, g_stride, mask, mask_stride, end, first + C, D
            )
        else:
            before, after, total = channel_decays(
                g, row, h, token, col, g_stride, mask, mask_stride, end, first + C, DV
            )
        if g is not None:
            reading, writing = before, after
            if REVERSE:
                reading, writing = after, before
        if out is not None:
            query = load(q, row, h // q_group, token, channel, q_stride, real, D)
            if KIND == "key":
                held = (query * reading).to(query.dtype)
                acc = tl.dot(held, s.to(query.dtype), input_precision="ieee")
            else:
                acc = tl.dot(query, s.to(query.dtype), input_precision="ieee")
                if g is not None:
                    acc = acc * (reading[:, None] if KIND == "head" else reading)
            if KIND == "value":
                acc += load(extra, row, h, token, col, extra_stride, real, DV) * v_scale
            else:
                seen = i[:, None] <= i[None, :] if REVERSE else i[:, None] >= i[None, :]
                if STRICT:
                    seen = seen & (i[:, None] != i[None, :])
                if KIND == "head":
                    a = tl.dot(query, tl.trans(key), input_precision="ieee")
                    if g is not None:
                        ratio = between(high, low)
                        a = a * (tl.trans(ratio) if REVERSE else ratio)
                    a = tl.where(seen, a, 0.0)
                else:
                    place = pairs + row * pairs_stride[0] + h * pairs_stride[1]
                    if REVERSE:  # pairs[later token, earlier token]
                        place += token.to(tl.int64)[None, :] * pairs_stride[2] + i[:, None]
                    else:
                        place += token.to(tl.int64)[:, None] * pairs_stride[2] + i[None, :]
                    a = tl.load(place, mask=seen & (token < end)[:, None] & (token < end)[None, :], other=0.0)
                acc += tl.dot(a.to(value.dtype), value, input_precision="ieee") * v_scale
            store(out, row, h, token, col, out_stride, token < end, acc * scale, DV)
        if CHUNKS > 1 or out is None:
            if g is not None:
                if KIND == "key":
                    key = (key * writing).to(value.dtype)
                else:
                    value = (value * (writing[:, None] if KIND == "head" else writing)).to(key.dtype)
            if KIND == "key":
                s = s * total[:, None]
            elif KIND == "value":
                s = s * total[None, :]
            else:
                s = s * total
            s += tl.dot(tl.trans(key), value, input_precision="ieee") * v_scale
            whole = whole * total
    if out is None:
        tl.store(target, s, mask=inside)
        if g is not None:
            if KIND == "head":
                tl.store(decays + at * heads + h, whole)
            else:
                tl.store(decays + (at * heads + h).to(tl.int64) * D + channel, whole, mask=channel < D)


@triton.jit
def _carry(
    state, decays, bounds, offsets, each, tokens,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr, CHUNKS: tl.constexpr,
    KIND: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """state [slots, H, D, DV], in place: slots hold what the segments add; after, the borders' states."""
    sequence_row, h = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    slot, _row, begin, end = sequence(sequence_row, bounds, offsets, each, tokens)
    first = slot - sequence_row  # segment
    count = tl.cdiv(end - begin, C * CHUNKS)
    item = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = item < D * DV
    step = heads * D * DV
    state += (slot * heads + h) * (D * DV) + item
    if REVERSE:
        state += count * step
    s = tl.load(state, mask=inside, other=0.0)
    for n in range(count):
        at = first + n
        if REVERSE:
            at = first + count - 1 - n
            state -= step
        else:
            state += step
        if decays is not None:
            if KIND == "head":
                s = s * tl.load(decays + at * heads + h)
            else:
                s = s * tl.load(decays + (at * heads + h) * D + item // DV, mask=inside, other=0.0)
        s += tl.load(state, mask=inside, other=0.0)
        tl.store(state, s, mask=inside)


def config(block_v: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_V": block_v}, num_warps=warps, num_stages=stages)


_KEY = ["D", "DV", "C", "CHUNKS", "KIND", "REVERSE"]
_half = launch.tuned([config(64, 4, 2), config(64, 8, 2), config(32, 4, 3)], _KEY)(_walk)
_wide_half = launch.tuned([config(64, 8, 2), config(128, 8, 2), config(32, 8, 2)], _KEY)(_walk)
_widest = launch.tuned([config(32, 8, 2), config(64, 8, 1), config(16, 8, 2)], _KEY)(_walk)
_single = launch.tuned([config(32, 8, 1), config(16, 8, 1)], _KEY)(_walk)


def _kernel(dtype: torch.dtype, wide: int) -> Any:
    if dtype == torch.float32:
        return _single
    return _half if wide <= 64 else _wide_half if wide == 128 else _widest


def _launch(
    tokens: Tokens,
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    decays: Tensor | None,
    out: Tensor | None,
    *,
    heads: int,
    kind: str,
    scale: float,
    v_scale: float,
    reverse: bool,
    strict: bool = False,
    pairs: Tensor | None = None,
    extra: Tensor | None = None,
) -> None:
    segments, g, mask = tokens
    d, dv = k.shape[3], v.shape[3]
    wide = launch.wide(d)

    def grid(args: dict[str, int]) -> tuple[int, int, int]:
        return segments.count, heads, triton.cdiv(dv, args["BLOCK_V"])

    _kernel(k.dtype, wide)[grid](
        q, k, v, g, mask, pairs, extra, state, decays, out, segments.table,
        *map(strides, (q, k, v, g, mask, pairs, extra, state, out)),
        segments.each, segments.tokens,
        heads // (k if q is None else q).shape[1], heads // k.shape[1], heads // v.shape[1],
        float(scale), float(v_scale), D=d, DV=dv, WIDE=wide, KIND=kind, REVERSE=reverse, STRICT=strict,
        **segments.sizes(),
    )  # fmt: skip


def borders(
    tokens: Tokens,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    heads: int,
    *,
    v_scale: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """The states at the borders of the segments [slots, H, Dk, Dv], from ``state`` [rows, H, Dk, Dv] (None:
    zeros) before the first token, or, in reverse, after the last."""
    segments, g, _ = tokens
    d, dv = k.shape[3], v.shape[3]
    state_of = first_states(segments, state, heads, d, dv, k.device, reverse)
    kind = "key" if tokens.by_channel else "head"
    decays = None
    if g is not None:
        shape = (segments.count, heads, d) if kind == "key" else (segments.count, heads)
        decays = torch.empty(shape, dtype=torch.float32, device=k.device)
    _launch(
        tokens, None, k, v, state_of, decays, None, heads=heads, kind=kind, scale=1.0, v_scale=v_scale,
        reverse=reverse,
    )  # fmt: skip
    _carry[(segments.rows, heads, triton.cdiv(d * dv, 512))](
        state_of, decays, *segments.whole(), D=d, DV=dv, BLOCK=512, KIND=kind, REVERSE=reverse,
        **segments.sizes(), num_warps=4,
    )  # fmt: skip
    return state_of


def first_states(
    segments: Segments,
    state: Tensor | None,
    heads: int,
    d: int,
    dv: int,
    device: torch.device,
    reverse: bool,
) -> Tensor:
    """The slots [slots, H, D, DV], only the one that each sequence starts from written."""
    slots = torch.empty(segments.count + segments.rows, heads, d, dv, dtype=torch.float32, device=device)
    slots[segments.last() if reverse else segments.first()] = 0.0 if state is None else state.float()
    return slots


def outputs(
    tokens: Tokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    dtype: torch.dtype,
    scale: float = 1.0,
    v_scale: float = 1.0,
    reverse: bool = False,
    strict: bool = False,
    pairs: Tensor | None = None,
    extra: Tensor | None = None,
) -> Tensor:
    """[B, H, T, Dv] in ``dtype``; ``state``: the borders'. pairs [B, H, T, C]: exp(d_ij) q_i . k_j where
    channels decay; extra [B, H, T, Dv]: the chunk's share of the output where the channels of v do."""
    heads = state.shape[1]
    kind = "head" if not tokens.by_channel else "value" if pairs is None else "key"
    out = torch.empty(*v.shape[:1], heads, *v.shape[2:], dtype=dtype, device=v.device)
    _launch(
        tokens, q, k, v, state, None, out, heads=heads, kind=kind, scale=scale, v_scale=v_scale,
        reverse=reverse, strict=strict, pairs=pairs, extra=extra,
    )  # fmt: skip
    return out
