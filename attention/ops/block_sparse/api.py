from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from ...kv import KV
from ...lists import BlockLists
from ...partial import Partial
from ...softmax import Softmax
from ..dispatch import Impls, LazyImpl, check_qkv, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.block_sparse,
    "eager": eager.block_sparse,
    "triton": LazyImpl(__package__, "block_sparse"),
    "flex": LazyImpl(__package__, "block_sparse", "flex"),
    "flex_flash": LazyImpl(__package__, "block_sparse", "flex_flash"),
    "flash4": LazyImpl(__package__, "block_sparse", "flash4"),
}


def block_sparse(
    q: Tensor,
    kv: KV,
    index: BlockLists,
    softmax: Softmax,
    *,
    check: bool = True,
    impl: str = "auto",
) -> Partial:
    """Causal attention of q [B, H, Tq, D] over the key blocks that ``index`` names in kv [B, Hkv, Tk].

    Queries are the last Tq positions. Rows in the left padding, and rows whose blocks hold no visible key,
    give (0, -inf). check=False spares the look at the index (on CUDA, a wait for the device) where its maker
    vouches for it. impl may also be "flash4" (FlashAttention-4's block lists), "flex" (torch's FlexAttention;
    on the CPU its lse is NaN) and "flex_flash" (its FLASH backend).
    Raises ValueError for shapes that do not fit and for an index with a block twice or out of range.
    """
    check_qkv("block_sparse", q, kv, index.start)
    if index.blocks.dim() != 4:
        raise ValueError(f"block_sparse takes blocks [B, Hkv or H, Nq, M]; got {list(index.blocks.shape)}.")
    if q.shape[2] > kv.length:
        raise ValueError(
            f"block_sparse needs the queries among the keys; got Tq = {q.shape[2]} > Tk = {kv.length}."
        )
    b, hs, nq, _ = index.blocks.shape
    need = -(-(index.lead + q.shape[2]) // index.block_q)
    if (
        b != q.shape[0]
        or hs not in (q.shape[1], kv.num_kv_heads)
        or nq < need
        or index.counts.shape != (b, hs, nq)
    ):
        raise ValueError(
            f"block_sparse takes blocks [B, Hkv or H, {need}, M] and counts of its first three sizes for q "
            f"{list(q.shape)}, "
            f"{kv} and block_q = {index.block_q}; got {list(index.blocks.shape)} and "
            f"{list(index.counts.shape)}."
        )
    if index.lead > kv.length - q.shape[2]:
        raise ValueError(
            f"block_sparse needs the lead of its index among the {kv.length - q.shape[2]} keys before the "
            f"queries; got lead = {index.lead}."
        )
    if check:
        index.check(kv.length)
    if not index.lead:
        return run("block_sparse", IMPLS, impl, q, kv, index, softmax)
    # The first block is completed with queries of zeros, whose results are dropped.
    filled, whole = pad(q, (0, 0, index.lead, 0)), replace(index, lead=0)
    part = run("block_sparse", IMPLS, impl, filled, kv, whole, softmax)
    return Partial(part.out[:, :, index.lead :], part.lse[:, :, index.lead :])
