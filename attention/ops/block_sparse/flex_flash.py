"""``block_sparse`` by FlexAttention with its ``FLASH`` backend, which is FlashAttention-4 behind a BlockMask:
a rival that ``auto`` takes where ``farspan tune`` found it faster.

Written after torch 2.13 (``kernel_options={"BACKEND": "FLASH"}``) and flash-attn-4 4.0.0b36; it has not run
on a GPU yet. Its log-sum-exp is a natural one. It cannot take a mask that captures a number that differs from
call to call, so it serves calls without keys before the queries: prompts that are not cut into chunks.
"""

from __future__ import annotations

from torch import Tensor

from ...kv import KV
from ...lists import BlockLists
from ...partial import Partial
from ...softmax import Softmax
from .. import library
from . import flash4, flex


def unsupported(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> list[str]:
    """Why FlexAttention's FLASH backend cannot run these arguments, one clause each."""
    reasons = library.cannot_call(flash4.MODULE, flash4.PACKAGE, q, flash4.MAJORS)
    reasons += flash4.cannot_cut(q, kv, index, rows=q.shape[2])
    if past := kv.length - q.shape[2]:
        reasons.append(f"it has no mask for keys before the queries, and there are {past}")
    return reasons or index.not_in_a_block_mask()


def block_sparse(q: Tensor, kv: KV, index: BlockLists, softmax: Softmax) -> Partial:
    return flex.attend(q, kv, index, softmax, {"BACKEND": "FLASH"})
