from __future__ import annotations

from torch import Tensor

from ...kv import KV
from ...lists import TokenLists
from ...partial import Partial
from ...softmax import Softmax
from ..dispatch import Impls, LazyImpl, check_qkv, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.gather_decode,
    "eager": eager.gather_decode,
    "triton": LazyImpl(__package__, "gather_decode"),
    "flashinfer": LazyImpl(__package__, "gather_decode", "flashinfer"),
}


def gather_decode(
    q: Tensor,
    kv: KV,
    index: TokenLists,
    softmax: Softmax,
    *,
    check: bool = True,
    impl: str = "auto",
) -> Partial:
    """Attention of q [B, H, Tq, D] over the keys that ``index`` names in kv [B, Hkv, Tk].

    The index holds only keys that are visible to its query; nothing else of kv is read. ``index.full``
    is ignored: rows that read everything belong to ``decode``. check=False
    spares the look at the index (on CUDA, a wait for the device) where its maker vouches for it. impl may
    also be "flashinfer", its batch decode.
    Raises ValueError for shapes that do not fit and for an index with a token twice or out of range.
    """
    check_qkv("gather_decode", q, kv, None)
    b, hs, tq = index.tokens.shape[:3]
    if b != q.shape[0] or tq != q.shape[2] or hs not in (q.shape[1], kv.num_kv_heads):
        raise ValueError(
            f"gather_decode takes an index [B, Hkv or H, Tq, K] for q {list(q.shape)} and {kv}; "
            f"got {list(index.tokens.shape)}."
        )
    if check:
        index.check(kv.length)
    return run("gather_decode", IMPLS, impl, q, kv, index, softmax)
