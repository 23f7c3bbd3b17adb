from __future__ import annotations

from torch import Tensor

from ...partial import Partial
from ..dispatch import Impls, LazyImpl, check_qkv, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.decode,
    "eager": eager.decode,
    "triton": LazyImpl(__package__, "decode"),
}


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    start: Tensor | None = None,
    impl: str = "auto",
) -> Partial:
    """Causal attention of the newest Tq queries (few) over all Tk keys, read once and never expanded to query
    heads.

    Same meaning of every argument as ``flash``: q [B, H, Tq, D], k, v [B, Hkv, Tk, D], queries at the last Tq
    positions.
    """
    check_qkv("decode", q, k, v, start)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"decode needs the queries among the keys; got Tq = {q.shape[2]} > Tk = {k.shape[2]}."
        )
    if window is not None and window < 1:
        raise ValueError(f"decode needs a window of at least 1 key; got {window}.")
    return run("decode", IMPLS, impl, q, k, v, scale=scale, window=window, softcap=softcap, start=start)
