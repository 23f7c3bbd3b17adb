from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...kv import KV
from ..dispatch import Impls, LazyImpl, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.append,
    "eager": eager.append,
    "triton": LazyImpl(__package__, "append"),
}


class Pages(NamedTuple):
    """entries [B, Hkv, P, 2 D]: the maximum and the minimum of each channel over the keys of a page. size:
    keys of a page. Pages are counted from each row's first position."""

    entries: Tensor
    size: int


class Labels(NamedTuple):
    """entries [B, Hkv, N, r]: the chosen channels of each key. channels [Hkv, r] int64: which ones."""

    entries: Tensor
    channels: Tensor


class Kept(NamedTuple):
    """A set of K keys per KV head: tokens [B, Hkv, K] int64, their positions; kv [B, Hkv, K], their keys and
    values. since [1] int32: the position of the token whose step has chosen the set.

    The n-th token after that one takes slot K - 1 - (n - 1) % K, so the last of the set is replaced first.
    """

    tokens: Tensor
    kv: KV
    since: Tensor


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
