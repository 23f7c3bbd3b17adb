"""SALE's estimate of attention logits (arXiv:2505.24179): products of integers, with the keys' means apart.

The paper subtracts one mean of all keys, which no summary that grows with the keys can know. Here each block
of keys has its own, and the part that it takes out of a logit, q . mean, is added back exactly, from the
unrounded q. The mean of Q is left in q: rounded to 8 bits (for which Hopper's matrix units are as fast as
they get; they have none for 4) q adds about 1/18 of the keys' own rounding error.
"""

from __future__ import annotations

from torch import Tensor

from ...softmax import Softmax
from ..dispatch import Impls, LazyImpl, run
from . import eager, reference
from .storage import Int4

QUANTISE_IMPLS: Impls = {
    "reference": reference.quantise_int4,
    "eager": eager.quantise_int4,
    "triton": LazyImpl(__package__, "quantise_int4"),
}
SCORES_IMPLS: Impls = {
    "reference": reference.int4_scores,
    "eager": eager.int4_scores,
    "triton": LazyImpl(__package__, "int4_scores"),
}
BLOCK_IMPLS: Impls = {
    "reference": reference.int4_block_max,
    "eager": eager.int4_block_max,
    "triton": LazyImpl(__package__, "int4_block_max"),
}


def quantise_int4(k: Tensor, block: int, *, start: Tensor | None = None, impl: str = "auto") -> Int4:
    """Keys k [B, Hkv, T, D] rounded to four bits around the means of their blocks: see :class:`Int4`, also
    for how it grows with the keys.

    A key is rounded among the others of its block, later ones included: what is selected by it looks ahead to
    the end of a key block. Raises ValueError for an odd D.
    """
    if k.dim() != 4 or k.shape[3] % 2:
        raise ValueError(
            f"quantise_int4 takes k [B, Hkv, T, D] with an even D, two numbers a byte; got {list(k.shape)}."
        )
    if block < 1:
        raise ValueError(f"quantise_int4 needs blocks of at least 1 position; got {block}.")
    if start is not None and start.shape != (k.shape[0],):
        raise ValueError(
            f"quantise_int4 takes start [B] = [{k.shape[0]}], each row's first valid position; got "
            f"{list(start.shape)}."
        )
    return run("quantise_int4", QUANTISE_IMPLS, impl, k, block, start=start)


def int4_scores(q: Tensor, k4: Int4, *, scale: float = 1.0, impl: str = "auto") -> Tensor:
    """Estimated logits scale * q k^T of a few queries q [B, H, T, D] -> [B, Hkv, G, T, N] in float32, as
    ``scores`` gives them for whole keys.

    q is not rounded: reading the keys is what takes time here. Nothing is masked; the padding gets 0. Raises
    ValueError for shapes that do not fit.
    """
    _check("int4_scores", q, k4)
    return run("int4_scores", SCORES_IMPLS, impl, q, k4, scale=scale)


def int4_block_max(
    q: Tensor,
    k4: Int4,
    row_offset: Tensor,
    softmax: Softmax,
    *,
    block_q: int,
    q_bits: int | None = 8,
    impl: str = "auto",
) -> Tensor:
    """The largest estimated logit of each block of queries and keys, relative to ``row_offset`` [B, H, Tq].

    -> [B, H, Nq, Nk] float32 (float64 for float64 q): max over the visible pairs of logit - row_offset, -inf
    where there is none; Nq = ceil(Tq / block_q), Nk = ceil(Tk / k4.block). q [B, H, Tq, D] are the last Tq
    positions; key blocks are those of k4, whose ``start`` also places the query blocks, as in BlockIndex.
    With the lse of an exact pass over some keys as the offset, a block passes SALE's test against a threshold
    tau where the result is at least log(tau). Nothing of size Tq x Tk is made.

    q_bits: q is rounded per row to integers of 8 bits or 4 (the paper's), or None: not at all.
    Raises ValueError for shapes that do not fit, and for a scale that is not above 0.
    """
    _check("int4_block_max", q, k4)
    tq, tk = q.shape[2], k4.scale.shape[2]
    if tq > tk:
        raise ValueError(f"int4_block_max needs the queries among the keys; got Tq = {tq} > Tk = {tk}.")
    if row_offset.shape != q.shape[:3]:
        raise ValueError(
            f"int4_block_max takes row_offset [B, H, Tq] = {list(q.shape[:3])}, one per query; got "
            f"{list(row_offset.shape)}."
        )
    if block_q < 1:
        raise ValueError(f"int4_block_max needs blocks of at least 1 query; got {block_q}.")
    if q_bits not in (4, 8, None):
        raise ValueError(f"int4_block_max rounds queries to 4 or 8 bits, or not at all (None); got {q_bits}.")
    if softmax.scale <= 0:
        raise ValueError(f"int4_block_max needs a scale above 0; got {softmax.scale}.")
    return run(
        "int4_block_max",
        BLOCK_IMPLS,
        impl,
        q,
        k4,
        row_offset,
        scale=softmax.scale,
        block_q=block_q,
        softcap=softmax.softcap,
        q_bits=q_bits,
    )


def _check(op: str, q: Tensor, k4: Int4) -> None:
    b, hkv, _, d = k4.mean.shape
    if q.dim() != 4 or q.shape[0] != b or q.shape[1] % hkv or q.shape[3] != d:
        raise ValueError(
            f"{op} got q {list(q.shape)} and four-bit keys {[*k4.scale.shape, d]}, which do not fit together."
        )
