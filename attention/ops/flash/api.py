from __future__ import annotations

from torch import Tensor

from ...kv import KV
from ...partial import Partial
from ...softmax import Softmax
from ..dispatch import Impls, LazyImpl, check_qkv, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.flash,
    "eager": eager.flash,
    "triton": LazyImpl(__package__, "flash"),
}


def flash(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int | None = None,
    start: Tensor | None = None,
    impl: str = "auto",
) -> Partial:
    """Causal attention of q [B, H, Tq, D] over kv [B, Hkv, Tk], bottom-right aligned: the queries are the
    last Tq positions.

    Of ``softmax`` the scale and the soft-cap are applied. window w lets a query see its last w keys only,
    itself included; start [B] is each row's first valid position (left padding). Rows in
    the padding give (0, -inf).
    Raises ValueError for shapes that do not fit.
    """
    check_qkv("flash", q, kv, start)
    if q.shape[2] > kv.length:
        raise ValueError(f"flash needs the queries among the keys; got Tq = {q.shape[2]} > Tk = {kv.length}.")
    if window is not None and window < 1:
        raise ValueError(f"flash needs a window of at least 1 key; got {window}.")
    return run("flash", IMPLS, impl, q, kv, softmax, window=window, start=start)
