from __future__ import annotations

from torch import Tensor

from ...partial import Partial
from ..dispatch import Impls, LazyImpl, check_qkv, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.flash,
    "eager": eager.flash,
    "triton": LazyImpl(__package__, "flash"),
}


def flash(
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
    """Causal attention of q [B, H, Tq, D] over k, v [B, Hkv, Tk, D], bottom-right aligned: the queries are
    the last Tq positions.

    scale multiplies the logits; softcap c bends them to c * tanh(logits / c); window w lets a query see its
    last w keys only, itself included; start [B] is each row's first valid position (left padding). Rows in
    the padding give (0, -inf).
    Raises ValueError for shapes that do not fit.
    """
    check_qkv("flash", q, k, v, start)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"flash needs the queries among the keys; got Tq = {q.shape[2]} > Tk = {k.shape[2]}."
        )
    if window is not None and window < 1:
        raise ValueError(f"flash needs a window of at least 1 key; got {window}.")
    return run("flash", IMPLS, impl, q, k, v, scale=scale, window=window, softcap=softcap, start=start)
