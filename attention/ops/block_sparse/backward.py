"""The backward of ``block_sparse`` in Triton: dq like the forward, dk and dv from the transposed index.

    s = scale * q k';  p = exp(s - lse);  delta = rowsum(out * dout) - dlse
    ds = p * (dout v' - delta);  dq = scale * ds k;  dk = scale * ds' q;  dv = p' dout

dq: a program holds a tile of queries and walks its list of key blocks, as in the forward. dk and dv: a
program holds a tile of keys and walks the query blocks that read it, head by head. Nobody adds to another's
sums, so two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import LOG2E, tanh
from ..tile import (
    KEY,
    ROWS_OF_A_TILE,
    below,
    config,
    fold,
    geometry,
    load_rows,
    query_tile,
    query_tiles,
    sized,
    slots,
    split,
    store_rows,
)


@triton.jit
def _weights(s, dp, lse, delta, scale, softcap):
    """p, and ds less the scale, of s = q k' and dp = dout v'; lse is in base 2."""
    if softcap is None:
        p = tl.exp2(s * (scale * LOG2E) - lse)
        ds = p * (dp - delta)
    else:
        bent = tanh(s * (scale / softcap))
        p = tl.exp2(bent * (softcap * LOG2E) - lse)
        ds = p * (dp - delta) * (1 - bent * bent)
    return p, ds


@triton.jit
def _walk_keys(
    acc, q, dout, lse, delta, position, last, k, v, head, k_stride, v_stride, blocks, order, first, count, tk,
    scale, softcap, begin, stop,
    EDGE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    """acc [M, WIDE] plus ds k over the tiles begin .. stop of the slots."""
    at, there = slots(begin, blocks, order, first, count, tk, BLOCK_K, BLOCK_N)
    for t in range(begin, stop):
        read = None
        if EDGE:
            read = there & (at <= last)
        key = load_rows(k, head, at, k_stride, read, D, WIDE)
        value = load_rows(v, head, at, v_stride, read, DV, WIDE_V)
        s = tl.dot(q, tl.trans(key), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
        _, ds = _weights(s, dp, lse[:, None], delta[:, None], scale, softcap)
        if EDGE:
            ds = tl.where(read[None, :] & (at[None, :] <= position[:, None]), ds, 0.0)
        acc = tl.dot(ds.to(key.dtype), key, acc, input_precision="ieee")
        at, there = slots(t + 1, blocks, order, first, count, tk, BLOCK_K, BLOCK_N)  # see ``attend``
    return acc


@triton.jit(do_not_specialize=["bucket"])
def _backward_q(
    q, k, v, out, lse, dout, dlse, dq, stats, blocks, counts, start, order,
    q_stride, k_stride, v_stride, out_stride, dout_stride, dq_stride,
    hs_heads, kv_heads, tq, tk, nq, m, scale, softcap,
    bucket,  # of the keys; only a key of the tuning
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    ROWS: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq, and delta and the lse in base 2 (+inf in empty rows: exp2(s - inf) is 0) for _backward_kv."""
    b, kv, hs, head, row, valid, top, last, first, blocks, count = query_tile(
        tl.program_id(0), blocks, counts, start, hs_heads, kv_heads, tq, tk, nq, m,
        GROUP, BLOCK_Q, BLOCK_K, ROWS, FOLD,
    )  # fmt: skip
    if order is not None:
        order += (b * hs_heads + hs) * tk
    slot_count, middle, stop = split(blocks, count, order, first, top, last, BLOCK_K, BLOCK_N)
    query = load_rows(q + b * q_stride[0], head, row, q_stride, valid, D, WIDE)
    grad = load_rows(dout + b * dout_stride[0], head, row, dout_stride, valid, DV, WIDE_V)
    answer = load_rows(out + b * out_stride[0], head, row, out_stride, valid, DV, WIDE_V)
    flat = (b * hs_heads * GROUP + head) * tq + row
    natural = tl.load(lse + flat, mask=valid, other=-float("inf"))
    empty = natural == -float("inf")
    base = tl.where(empty, float("inf"), natural * LOG2E)
    slope = tl.sum(answer.to(tl.float32) * grad.to(tl.float32), 1)
    if dlse is not None:
        slope -= tl.load(dlse + flat, mask=valid, other=0.0)
    slope = tl.where(empty, 0.0, slope)
    tl.store(stats + flat * 2, slope, mask=valid)
    tl.store(stats + flat * 2 + 1, base, mask=valid)

    k += b * k_stride[0]
    v += b * v_stride[0]
    acc = tl.zeros((ROWS * FOLD, WIDE), tl.float32)
    position = row + (tk - tq)
    if order is None:
        acc = _walk_keys(
            acc, query, grad, base, slope, position, last, k, v, kv, k_stride, v_stride, blocks, order,
            first, slot_count, tk, scale, softcap, 0, middle, False, BLOCK_K, BLOCK_N, D, DV, WIDE, WIDE_V,
        )  # fmt: skip
    acc = _walk_keys(
        acc, query, grad, base, slope, position, last, k, v, kv, k_stride, v_stride, blocks, order,
        first, slot_count, tk, scale, softcap, middle, stop, True, BLOCK_K, BLOCK_N, D, DV, WIDE, WIDE_V,
    )  # fmt: skip
    store_rows(dq + b * dq_stride[0], head, row, dq_stride, valid, acc * scale, D, WIDE)


@triton.jit
def _walk_queries(
    dk, dv, key, value, position, q, dout, stats, q_stride, dout_stride, hs, readers, begin_row, past, tq,
    scale, softcap, begin, stop,
    EDGE: tl.constexpr, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, FOLD: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    """dk [N, WIDE] (less the scale) and dv [N, WIDE_V] plus those of readers[begin:stop], all heads of hs."""
    chunks: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    pieces: tl.constexpr = (BLOCK_Q + ROWS - 1) // ROWS
    r = tl.arange(0, ROWS * FOLD)
    n = tl.load(readers + begin, mask=begin < stop, other=0)
    for i in range(begin * pieces * chunks, stop * pieces * chunks):
        inside = i // chunks % pieces * ROWS + r % ROWS
        member, row = i % chunks * FOLD + r // ROWS, begin_row + n * BLOCK_Q + inside
        head = hs * GROUP + member
        valid = (member < GROUP) & (inside < BLOCK_Q) & (row < tq)
        query = load_rows(q, head, row, q_stride, valid, D, WIDE)
        grad = load_rows(dout, head, row, dout_stride, valid, DV, WIDE_V)
        at = stats + (head.to(tl.int64) * tq + row) * 2
        slope = tl.load(at, mask=valid, other=0.0)
        base = tl.load(at + 1, mask=valid, other=float("inf"))
        s = tl.dot(key, tl.trans(query), input_precision="ieee")  # [N, M]
        dp = tl.dot(value, tl.trans(grad), input_precision="ieee")
        p, ds = _weights(s, dp, base[None, :], slope[None, :], scale, softcap)
        if EDGE:
            seen = valid[None, :] & (position[:, None] <= past + row[None, :])
            p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision="ieee")
        following = (i + 1) // (pieces * chunks)
        n = tl.load(readers + following, mask=following < stop, other=0)  # one ahead: see ``attend``
    return dk, dv


@triton.jit(do_not_specialize=["bucket"])
def _backward_kv(
    q, k, v, dout, dk, dv, stats, readers, offsets, start, order,
    q_stride, k_stride, v_stride, dout_stride, dk_stride, dv_stride,
    hs_heads, kv_heads, tq, tk, nk, scale, softcap,
    bucket,  # of the keys; only a key of the tuning
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    ROWS: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, Hs, Tk, ...] of one tile of keys. The first keys, which most queries read, go first."""
    pieces: tl.constexpr = (BLOCK_K + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    piece, block = pid % pieces, pid // pieces % nk
    hs = pid // (pieces * nk)
    b, hs = (hs // hs_heads).to(tl.int64), hs % hs_heads
    kv = hs // (hs_heads // kv_heads)
    past = tk - tq
    first = 0
    if start is not None:
        first = tl.load(start + b).to(tl.int32)
    begin_row = tl.maximum(first - past, 0)

    inside = piece * BLOCK_N + tl.arange(0, BLOCK_N)
    position = first + block * BLOCK_K + inside
    there = (inside < BLOCK_K) & (position < tk)
    at = offsets + (b * hs_heads + hs) * nk + block
    lo = tl.load(at)
    readers += lo
    # Ascending: those before the keys, skipped; those beside them, masked; those that see them all. Lists of
    # query blocks beyond the row's end (a padded row has fewer blocks) count for nothing.
    stop = below(readers, (tl.load(at + 1) - lo).to(tl.int32), tl.cdiv(tq - begin_row, BLOCK_Q))
    begin, middle = 0, stop
    if order is None:
        lowest = first + block * BLOCK_K + piece * BLOCK_N
        highest = tl.minimum(lowest + BLOCK_N, first + (block + 1) * BLOCK_K) - 1
        begin = below(readers, stop, tl.maximum(lowest - past - begin_row, 0) // BLOCK_Q)
        middle = below(readers, stop, tl.cdiv(tl.maximum(highest - past - begin_row, 0), BLOCK_Q))
    else:
        position = tl.load(order + (b * hs_heads + hs) * tk + position, mask=there, other=0).to(tl.int32)

    key = load_rows(k + b * k_stride[0], kv, position, k_stride, there, D, WIDE)
    value = load_rows(v + b * v_stride[0], kv, position, v_stride, there, DV, WIDE_V)
    q += b * q_stride[0]
    dout += b * dout_stride[0]
    stats += b * hs_heads * GROUP * tq * 2
    grad_k = tl.zeros((BLOCK_N, WIDE), tl.float32)
    grad_v = tl.zeros((BLOCK_N, WIDE_V), tl.float32)
    grad_k, grad_v = _walk_queries(
        grad_k, grad_v, key, value, position, q, dout, stats, q_stride, dout_stride, hs, readers, begin_row,
        past, tq, scale, softcap, begin, middle, True, GROUP, BLOCK_Q, ROWS, FOLD, D, DV, WIDE, WIDE_V,
    )  # fmt: skip
    if order is None:
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, key, value, position, q, dout, stats, q_stride, dout_stride, hs, readers,
            begin_row, past, tq, scale, softcap, middle, stop, False, GROUP, BLOCK_Q, ROWS, FOLD,
            D, DV, WIDE, WIDE_V,
        )  # fmt: skip
    store_rows(dk + b * dk_stride[0], hs, position, dk_stride, there, grad_k * scale, D, WIDE)
    store_rows(dv + b * dv_stride[0], hs, position, dv_stride, there, grad_v, DV, WIDE_V)


_KEYS_OF_A_TILE = {"BLOCK_N": lambda args: fold(args["BLOCK_K"], 1, args["BLOCK_N"])[0]}

_run_backward_q = sized(
    triton.heuristics(ROWS_OF_A_TILE)(_backward_q),
    KEY,
    half=[config(128, 64, 8, 3), config(64, 64, 4, 3)],
    wide_half=[config(64, 32, 8, 3)],
    single=[config(16, 16, 8, 1)],
)
_run_backward_kv = sized(
    triton.heuristics(ROWS_OF_A_TILE | _KEYS_OF_A_TILE)(_backward_kv),
    KEY,
    half=[config(32, 128, 8, 2), config(32, 128, 8, 3), config(64, 64, 8, 2)],  # two sums: registers bound it
    wide_half=[config(32, 32, 8, 3)],
    single=[config(16, 16, 8, 1)],
)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    counts: Tensor,
    start: Tensor | None,
    order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    block_q: int,
    block_k: int,
    keys: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv of the gradients of out and lse (None: zero). keys: dk and dv are wanted."""
    (b, h, tq, _), hs, hkv, tk = q.shape, counts.shape[1], k.shape[1], k.shape[2]
    sizes = geometry(q, v.shape[-1], counts, block_q, block_k)
    wide, bucket = max(sizes["WIDE"], sizes["WIDE_V"]), launch.bucket(tk)
    dout = torch.zeros_like(out) if dout is None else dout
    if dout.stride(-1) != 1:  # an expanded gradient would be read number by number
        dout = dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    # Written everywhere but in the padding, where it is zero.
    fresh = torch.empty if start is None else torch.zeros
    dq = fresh(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty(b, h, tq, 2, dtype=torch.float32, device=q.device)  # delta, lse in base 2
    _run_backward_q(q.dtype, wide)[query_tiles(b * hs, tq)](
        q, k, v, out, lse, dout, dlse, dq, stats, blocks, counts, start, order,
        q.stride(), k.stride(), v.stride(), out.stride(), dout.stride(), dq.stride(),
        hs, hkv, tq, tk, counts.shape[2], blocks.shape[3], scale, softcap, bucket, **sizes,
    )  # fmt: skip
    if not keys:
        return dq, None, None
    # The query heads of a group may have lists of their own: their gradients are summed in float32.
    kind = k.dtype if hs == hkv else torch.float32
    dk, dv = (fresh(b, hs, tk, x.shape[-1], dtype=kind, device=q.device) for x in (k, v))
    nk = -(-tk // block_k)
    readers, offsets = transposed(blocks, counts, nk)

    def key_tiles(args: dict[str, Any]) -> tuple[int]:
        return (b * hs * nk * -(-block_k // args["BLOCK_N"]),)

    _run_backward_kv(q.dtype, wide)[key_tiles](
        q, k, v, dout, dk, dv, stats, readers, offsets, start, order,
        q.stride(), k.stride(), v.stride(), dout.stride(), dk.stride(), dv.stride(),
        hs, hkv, tq, tk, nk, scale, softcap, bucket, **sizes,
    )  # fmt: skip
    if hs != hkv:
        dk, dv = (x.view(b, hkv, hs // hkv, tk, -1).sum(2).to(y.dtype) for x, y in ((dk, k), (dv, v)))
    return dq, dk, dv


def transposed(blocks: Tensor, counts: Tensor, nk: int) -> tuple[Tensor, Tensor]:
    """Who reads each key block, of blocks [B, Hs, Nq, M] and counts [B, Hs, Nq].

    -> query blocks [B * Hs * Nq * M] int32, ascending within readers[offsets[x]:offsets[x + 1]], the list of
    key block j of index head h of row b at x = (b * Hs + h) * nk + j; offsets [B * Hs * nk + 1] int64. As
    large as the index, and no synchronisation with the host.
    """
    b, hs, nq, m = blocks.shape
    used = torch.arange(m, device=blocks.device) < counts[..., None]
    used &= blocks < nk
    head = torch.arange(b * hs, dtype=torch.int32, device=blocks.device).view(b, hs, 1, 1)
    lists = b * hs * nk
    place = torch.where(used, blocks + head * nk, lists).view(-1)  # those past the count go last
    place, entry = place.sort(stable=True)
    bounds = torch.arange(lists + 1, dtype=place.dtype, device=blocks.device)
    return (entry // m % nq).int(), torch.searchsorted(place, bounds)
