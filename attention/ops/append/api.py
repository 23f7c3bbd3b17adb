from __future__ import annotations

from torch import Tensor

from ...kv import KV
from ..dispatch import Impls, LazyImpl, run
from . import eager, reference
from .beside import Kept, Labels, Pages

IMPLS: Impls = {
    "reference": reference.append,
    "eager": eager.append,
    "triton": LazyImpl(__package__, "append"),
}


def append(
    k: Tensor,
    v: Tensor,
    kv: KV,
    length: Tensor,
    *,
    start: Tensor | None = None,
    pages: Pages | None = None,
    labels: Labels | None = None,
    kept: Kept | None = None,
    impl: str = "auto",
) -> None:
    """Write the new key k [B, Hkv, 1, D] and value v [B, Hkv, 1, Dv] into the buffers ``kv`` [B, Hkv, N], at
    position length - 1, and into what is kept beside them.

    length: [1] int32, the number of keys with the new one. start: [B], the first position of each row; None:
    0. The page of the new key must hold the keys before it, and is begun anew by the first key of a page.
    Doing it twice changes nothing. Raises ValueError for shapes that do not fit.
    """
    shapes = (*kv.shape[:2], 1)
    if k.shape[:3] != shapes or v.shape[:3] != shapes:
        raise ValueError(
            f"append takes one key and one value for {kv}; got k {list(k.shape)} and v {list(v.shape)}."
        )
    how = {"start": start, "pages": pages, "labels": labels, "kept": kept}
    run("append", IMPLS, impl, k, v, kv, length, **how)
