"""``block_sparse`` by FlashAttention-4's block lists: a rival that ``auto`` takes where ``farspan tune``
found it faster.

Written after flash-attn-4 4.0.0b36 (``flash_attn_func`` and ``BlockSparseTensorsTorch`` of
``flash_attn.cute``); it has not run on a GPU yet. Its queries and keys are [B, T, H, D], its lists
[B, H, query blocks, key blocks]: blocks within which a mask decides, and blocks that are read as a whole.
Where the heads of a group share a list, a tile holds all of them; the library does so for lists of one head,
so KV heads become rows of the batch:

    q [B, H, Tq, D] -> [B * Hkv, Tq, H / Hkv, D]      k, v [B, Hkv, Tk, D] -> [B * Hkv, Tk, 1, D]
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from ...kv import KV
from ...lists import BlockLists
from ...partial import Partial, empty_partial
from ...softmax import Softmax
from .. import library

MODULE, PACKAGE, MAJORS = "flash_attn.cute", "flash-attn-4", (9, 10, 11)


def unsupported(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> list[str]:
    """Why FlashAttention-4 cannot run these arguments, one clause each."""
    shared = q.shape[1] // kv.num_kv_heads if index.blocks.shape[1] == kv.num_kv_heads else 1
    reasons = library.cannot_call(MODULE, PACKAGE, q, MAJORS)
    reasons += cannot_cut(q, kv, index, rows=q.shape[2] * shared)
    # The look at the padding waits for the device, so it comes last.
    return reasons or index.not_in_a_block_mask()


def cannot_cut(q: Tensor, kv: KV, index: BlockLists, *, rows: int) -> list[str]:
    """Why the library's tiles do not fit these heads and blocks, one clause each. rows: the queries of one
    list, counted once for each head in a tile."""
    reasons = []
    if kv.streams:
        reasons.append(f"it reads plain keys and values, and these are stored as {kv.format}")
    if torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad):
        reasons.append("an input needs a gradient, and only the forward has block lists here")
    d, dv, block_q, block_k = kv.head_dim, kv.value_dim, index.block_q, index.block_k
    major = library.capability(q.device)
    if major not in MAJORS:
        return reasons
    if major == 9:
        if max(d, dv) > 256 or d % 8 or dv % 8:
            reasons.append(f"heads are multiples of 8 up to 256; these have {d} and {dv}")
        most = 80 if d > 192 else 112 if d > 128 and dv > 128 else 128
        if block_q % 64:
            reasons.append(f"query blocks are multiples of 64; these have {block_q}")
        if block_k > most or (block_k != most and block_k % 16):
            reasons.append(
                f"key blocks are a multiple of 16 up to {most} for these heads; these have {block_k}"
            )
        return reasons
    if (d, dv) not in ((192, 128), (256, 256)) and (max(d, dv) > 128 or d % 8 or dv % 8):
        reasons.append(f"heads are multiples of 8 up to 128, 192 and 128, or 256; these have {d} and {dv}")
    tile = 256 if rows > 128 and dv != 256 else 128
    if block_q % tile or block_k % 128:
        reasons.append(
            f"query blocks are multiples of {tile} and key blocks of 128; these have {block_q} and {block_k}"
        )
    return reasons


def block_sparse(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> Partial:
    (b, h, tq, _), hkv = q.shape, kv.num_kv_heads
    if q.numel() == 0 or kv.length == 0:
        return empty_partial(q, kv.value_dim)
    attention = importlib.import_module(MODULE).flash_attn_func
    kind = importlib.import_module(f"{MODULE}.block_sparsity").BlockSparseTensorsTorch
    k, v = kv.dense()
    partial, full = index.partial_and_full(tq, kv.length)
    lists = [*partial, *full]
    if index.blocks.shape[1] == hkv:
        q = q.reshape(b * hkv, h // hkv, *q.shape[2:])
        k, v = (x.reshape(b * hkv, 1, *x.shape[2:]) for x in (k, v))
        lists = [x.flatten(0, 1)[:, None] for x in lists]
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        softmax_scale=float(softmax.scale),
        softcap=softmax.softcap or 0.0,
        mask_mod=_causal(),
        block_sparse_tensors=kind(
            mask_block_cnt=lists[0],
            mask_block_idx=lists[1],
            full_block_cnt=lists[2],
            full_block_idx=lists[3],
            block_size=(index.block_q, index.block_k),
        ),
        return_lse=True,
    )
    return Partial(out.transpose(1, 2).reshape(b, h, tq, -1), lse.reshape(b, h, tq))


@functools.cache
def _causal() -> Any:
    """The library's mask within a block: a key is read by the queries at its position and after it. Queries
    are the last positions."""
    cutlass, cute = importlib.import_module("cutlass"), importlib.import_module("cutlass.cute")
    utils = importlib.import_module(f"{MODULE}.utils")

    @cute.jit
    def causal(batch, head, query, key, lengths, tensors):  # type: ignore[no-untyped-def]
        past = utils.scalar_to_ssa(lengths.seqlen_k - lengths.seqlen_q, cutlass.Int32)
        return key <= query + past

    return causal
