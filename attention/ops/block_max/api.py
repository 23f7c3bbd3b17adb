from __future__ import annotations

from torch import Tensor

from ...kv import KV
from ...softmax import Softmax
from ..dispatch import Impls, LazyImpl, check_qkv, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.block_max,
    "eager": eager.block_max,
    "triton": LazyImpl(__package__, "block_max"),
}


def block_max(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    softmax: Softmax,
    *,
    block_q: int,
    block_k: int,
    start: Tensor | None = None,
    heads: str = "each",
    impl: str = "auto",
) -> Tensor:
    """The largest causal attention probability of each block of queries and keys: what a learned block
    selection is trained towards (SeerAttention, arXiv:2410.13276; per group in -R, arXiv:2506.08889).

    q [B, H, Tq, D] are the last Tq positions of k [B, Hkv, Tk, D]; lse [B, H, Tq] is their dense attention's,
    from ``flash`` with the same softmax and start. -> [B, H, Nq, Nk] float32 (float64 for float64
    inputs) with Nq = ceil(Tq / block_q), Nk = ceil(Tk / block_k): the maximum of exp(logit - lse) over the
    visible pairs of each block, 0 where there is none. heads="group": the maximum over the query heads of a
    group too, [B, Hkv, Nq, Nk].

    Blocks lie as in BlockIndex: with left padding (start [B], each row's first valid position) key block j of
    row b begins at start[b] + j * block_k, and query block n counts from the row's first valid query here.
    Nothing of size Tq x Tk is made. The result carries no gradient. Raises ValueError for shapes that do not
    fit.
    """
    check_qkv("block_max", q, KV(k, k), start)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"block_max needs the queries among the keys; got Tq = {q.shape[2]} > Tk = {k.shape[2]}."
        )
    if lse.shape != q.shape[:3]:
        raise ValueError(
            f"block_max takes lse [B, H, Tq] = {list(q.shape[:3])}, one per query; got {list(lse.shape)}."
        )
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_max needs blocks of at least 1 position; got {block_q} and {block_k}.")
    if heads not in ("each", "group"):
        raise ValueError(f"block_max pools heads 'each' or per 'group'; got {heads!r}.")
    return run(
        "block_max",
        IMPLS,
        impl,
        q,
        k,
        lse,
        scale=softmax.scale,
        block_q=block_q,
        block_k=block_k,
        softcap=softmax.softcap,
        start=start,
        heads=heads,
    )
