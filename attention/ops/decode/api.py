from __future__ import annotations

from torch import Tensor

from ...kv import KV
from ...partial import Partial
from ...softmax import Softmax
from ..dispatch import Impls, LazyImpl, check_qkv, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.decode,
    "eager": eager.decode,
    "triton": LazyImpl(__package__, "decode"),
}


def decode(
    q: Tensor,
    kv: KV,
    softmax: Softmax,
    *,
    window: int | None = None,
    sinks: int = 0,
    start: Tensor | None = None,
    length: Tensor | None = None,
    impl: str = "auto",
) -> Partial:
    """Causal attention of the newest Tq queries (few) over all Tk keys, read once and never expanded to query
    heads.

    Same meaning of every argument as ``flash``: q [B, H, Tq, D], kv [B, Hkv, Tk], queries at the last Tq
    positions. sinks: with a window, this many of the first keys of each row are read besides it.
    length: [1] int32 on the device of q: only this many of the Tk keys count, and the rest of kv is not read.
    Eager torch and the reference read it on the host, which is a wait for CUDA; the kernel does not.
    """
    check_qkv("decode", q, kv, start)
    if q.shape[2] > kv.length:
        raise ValueError(
            f"decode needs the queries among the keys; got Tq = {q.shape[2]} > Tk = {kv.length}."
        )
    if window is not None and window < 1:
        raise ValueError(f"decode needs a window of at least 1 key; got {window}.")
    if sinks < 0 or (sinks and window is None):
        raise ValueError(
            f"decode takes sinks, at least 0, beside a window; got sinks={sinks}, window={window}."
        )
    return run("decode", IMPLS, impl, q, kv, softmax, window=window, sinks=sinks, start=start, length=length)
