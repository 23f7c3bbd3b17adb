from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import pad

from ...partial import Partial
from ..dispatch import Impls, LazyImpl, check_qkv, run
from . import eager, reference

if TYPE_CHECKING:
    from ...selection import BlockIndex

IMPLS: Impls = {
    "reference": reference.block_sparse,
    "eager": eager.block_sparse,
    "triton": LazyImpl(__package__, "block_sparse"),
    "flex": LazyImpl(__package__, "block_sparse", "flex"),
}


def block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    *,
    scale: float,
    softcap: float | None = None,
    check: bool = True,
    impl: str = "auto",
) -> Partial:
    """Causal attention of q [B, H, Tq, D] over the key blocks that ``index`` names in k, v [B, Hkv, Tk, D].

    Queries are the last Tq positions. Rows in the left padding, and rows whose blocks hold no visible key,
    give (0, -inf). check=False spares the look at the index (on CUDA, a wait for the device) where its maker
    vouches for it. impl may also be "flex", torch's FlexAttention (CUDA; on the CPU its lse is NaN).
    Raises ValueError for shapes that do not fit and for an index with a block twice or out of range.
    """
    check_qkv("block_sparse", q, k, v, index.start)
    if index.blocks.dim() != 4:
        raise ValueError(f"block_sparse takes blocks [B, Hkv or H, Nq, M]; got {list(index.blocks.shape)}.")
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"block_sparse needs the queries among the keys; got Tq = {q.shape[2]} > Tk = {k.shape[2]}."
        )
    b, hs, nq, _ = index.blocks.shape
    need = -(-(index.lead + q.shape[2]) // index.block_q)
    if (
        b != q.shape[0]
        or hs not in (q.shape[1], k.shape[1])
        or nq < need
        or index.counts.shape != (b, hs, nq)
    ):
        raise ValueError(
            f"block_sparse takes blocks [B, Hkv or H, {need}, M] and counts of its first three sizes for q "
            f"{list(q.shape)}, "
            f"k {list(k.shape)} and block_q = {index.block_q}; got {list(index.blocks.shape)} and "
            f"{list(index.counts.shape)}."
        )
    if index.lead > k.shape[2] - q.shape[2]:
        raise ValueError(
            f"block_sparse needs the lead of its index among the {k.shape[2] - q.shape[2]} keys before the "
            f"queries; got lead = {index.lead}."
        )
    if check:
        index.check(k.shape[2])
    if not index.lead:
        return run("block_sparse", IMPLS, impl, q, k, v, index, scale=scale, softcap=softcap)
    # The first block is filled up with queries of zeros, whose results nobody reads.
    filled, whole = pad(q, (0, 0, index.lead, 0)), replace(index, lead=0)
    part = run("block_sparse", IMPLS, impl, filled, k, v, whole, scale=scale, softcap=softcap)
    return Partial(part.out[:, :, index.lead :], part.lse[:, :, index.lead :])
