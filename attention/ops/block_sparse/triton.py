"""``block_sparse`` in Triton, for Hopper's matrix units.

A program holds a tile of queries (up to 128 rows: the heads of a group side by side while the
query block is shorter than that) and walks its list of key blocks. Blocks are ascending, so the list splits
at two counts, and only the blocks between them need masks:

    index of a query block   [0  3  4  9 | 10  11 | 17]        10, 11: reach past the tile's first row
                              no masks     masked   skipped    17: begins after its last row

The backward is in backward.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kv import KV
from ...lists import BlockLists
from ...partial import Partial, empty_partial
from ...softmax import Softmax
from .. import launch
from ..launch import finish
from ..tile import (
    KEY,
    ROWS_OF_A_TILE,
    attend,
    cannot_tile,
    config,
    geometry,
    load_rows,
    query_tile,
    query_tiles,
    sized,
    split,
    store_rows,
)
from .backward import backward


def unsupported(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> list[str]:
    return cannot_tile(q, kv, softmax)


@triton.jit(do_not_specialize=["bucket"])
def _forward(
    q, kv, out, lse, blocks, counts, start, order, q_stride, kv_stride, out_stride,
    hs_heads, kv_heads, tq, tk, nq, m, scale, softcap,
    bucket,  # of the keys; only a key of the tuning
    GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    LOAD: tl.constexpr,
    FORMAT: tl.constexpr,  # likewise
    ROWS: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, kv_head, hs, head, row, valid, top, last, first, blocks, count = query_tile(
        tl.program_id(0), blocks, counts, start, hs_heads, kv_heads, tq, tk, nq, m,
        GROUP, BLOCK_Q, BLOCK_K, ROWS, FOLD,
    )  # fmt: skip
    if order is not None:
        order += (b * hs_heads + hs) * tk
    slot_count, middle, stop = split(blocks, count, order, first, top, last, BLOCK_K, BLOCK_N)
    query = load_rows(q + b * q_stride[0], head, row, q_stride, valid, D, WIDE)
    acc = tl.zeros((ROWS * FOLD, WIDE_V), tl.float32)
    peak = tl.full((ROWS * FOLD,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS * FOLD,), tl.float32)
    position = row + (tk - tq)
    if order is None:
        acc, peak, total = attend(
            acc, peak, total, query, position, last, kv, kv_stride, b, kv_head, blocks, order, first,
            slot_count, tk, None, scale, softcap, 0, middle, LOAD, False, BLOCK_K, BLOCK_N, D, DV, WIDE,
            WIDE_V,
        )  # fmt: skip
    acc, peak, total = attend(
        acc, peak, total, query, position, last, kv, kv_stride, b, kv_head, blocks, order, first,
        slot_count, tk, None, scale, softcap, middle, stop, LOAD, True, BLOCK_K, BLOCK_N, D, DV, WIDE, WIDE_V,
    )  # fmt: skip
    acc, natural = finish(acc, peak, total)
    store_rows(out + b * out_stride[0], head, row, out_stride, valid, acc, DV, WIDE_V)
    tl.store(lse + (b * hs_heads * GROUP + head) * tq + row, natural, mask=valid)


# 128 rows are two warpgroups of 64; a third stage keeps the next keys on their way during the softmax.
_run_forward = sized(
    triton.heuristics(ROWS_OF_A_TILE)(_forward),
    [*KEY, "FORMAT"],
    half=[config(128, 64, 8, 3), config(128, 64, 8, 4), config(64, 64, 4, 3)],
    whole_blocks=[config(128, 64, 8, 3), config(128, 64, 8, 4), config(128, 128, 8, 2), config(64, 64, 4, 3)],
    wide_half=[config(128, 32, 8, 3), config(64, 32, 4, 3)],
    single=[config(32, 16, 8, 1)],
)


def block_sparse(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> Partial:
    if q.numel() == 0 or kv.length * kv.value_dim == 0:
        return empty_partial(q, kv.value_dim)
    lists = _Lists(
        index.blocks.contiguous(),
        index.counts.contiguous(),
        launch.row_starts(index.start, q.device),
        None if index.key_order is None else index.key_order.contiguous(),
        index.block_q,
        index.block_k,
    )
    if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad):
        return Partial(*_BlockSparse.apply(q, *kv.dense(), lists, softmax))  # the backward reads plain rows
    return _attend(q, kv, lists, softmax)


class _Lists(NamedTuple):
    """What the kernels read of BlockLists."""

    blocks: Tensor
    counts: Tensor
    start: Tensor | None
    order: Tensor | None
    block_q: int
    block_k: int


def _attend(q: Tensor, kv: KV, lists: _Lists, softmax: Softmax) -> Partial:
    blocks, counts, start, order, block_q, block_k = lists
    (b, h, tq, _), hs, dv = q.shape, counts.shape[1], kv.value_dim
    sizes = geometry(q, dv, counts, block_q, block_k)
    if start is None:
        out = q.new_empty(b, h, tq, dv)
        lse = torch.empty(b, h, tq, dtype=torch.float32, device=q.device)
    else:  # queries in the padding belong to no block
        out, lse = empty_partial(q, dv)
    _run_forward(q.dtype, max(sizes["WIDE"], sizes["WIDE_V"]), block_k)[query_tiles(b * hs, tq)](
        q, kv.stored, out, lse, blocks, counts, start, order,
        q.stride(), kv.strides(), out.stride(),
        hs, kv.num_kv_heads, tq, kv.length, counts.shape[2], blocks.shape[3], float(softmax.scale),
        softmax.softcap, launch.bucket(kv.length), LOAD=kv.load_function(), FORMAT=kv.format, **sizes,
    )  # fmt: skip
    return Partial(out, lse)


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lists, softmax):
        out, lse = _attend(q, KV(k, v), lists, softmax)
        ctx.save_for_backward(q, k, v, *lists[:4], out, lse)
        ctx.how = float(softmax.scale), softmax.softcap, lists.block_q, lists.block_k
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        scale, softcap, block_q, block_k = ctx.how
        wanted = ctx.needs_input_grad[:3]
        grads = backward(
            *ctx.saved_tensors, dout, dlse, scale=scale, softcap=softcap, block_q=block_q, block_k=block_k,
            keys=wanted[1] or wanted[2],
        )  # fmt: skip
        return *(grad if wants else None for grad, wants in zip(grads, wanted, strict=True)), None, None
