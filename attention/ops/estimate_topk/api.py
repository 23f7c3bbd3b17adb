from __future__ import annotations

from torch import Tensor

from ...lists import TokenLists
from ...softmax import Softmax
from ..dispatch import Impls, LazyImpl, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.estimate_topk,
    "eager": eager.estimate_topk,
    "triton": LazyImpl(__package__, "estimate_topk"),
}


def estimate_topk(
    q: Tensor,
    entries: Tensor,
    softmax: Softmax,
    length: Tensor,
    k: int | None,
    *,
    fraction: float | None = None,
    page: int | None = None,
    channels: Tensor | None = None,
    reduce: str = "sum",
    start: Tensor | None = None,
    impl: str = "auto",
) -> TokenLists:
    """The at most ``k`` keys that the query q [B, H, 1, D] at position length - 1 should read; or the
    ``fraction`` of the keys that it sees, rounded to even, at least 1.

    entries: with ``page``, [B, Hkv, P, 2 D], the maximum and the minimum of each channel over every ``page``
    keys from the row's start on. A page is estimated by sum over channels of max(q max, q min), Quest's
    bound; the best k // page pages are read whole, at least one, the query's own always among them, and all
    pages where k covers the row. With ``channels`` [Hkv, r] int64, entries [B, Hkv, N, r] are these channels
    of each key, and the best k keys by q_channels . entry are read.
    reduce: "sum" or "max" over the group of each head's softmax of its estimates, or "none": a list for each
    query head. Equal estimates go to the lowest position. length: [1] int32, the number of keys, the query's
    own included; start: [B], the first position of each row, None: 0. Nothing else of ``entries`` is read.

    -> tokens [B, Hs, 1, K], ascending, and counts [B, Hs, 1] int32 (in eager torch None where all K count).
    What stands past a count is not defined.
    Eager torch and the reference read the length on the host, which is a wait for CUDA; the kernels do not.
    Raises ValueError for shapes that do not fit.
    """
    if (page is None) == (channels is None):
        raise ValueError("estimate_topk takes entries of pages or of channels: give page or channels.")
    if (k is None) == (fraction is None):
        raise ValueError(f"estimate_topk takes k or fraction; got k={k} and fraction={fraction}.")
    if (k is not None and k < 1) or (page is not None and page < 1):
        raise ValueError(f"estimate_topk takes k and page of at least 1; got k={k} and page={page}.")
    if reduce not in ("sum", "max", "none"):
        raise ValueError(f"estimate_topk takes reduce 'sum', 'max' or 'none'; got {reduce!r}.")
    width = 2 * q.shape[3] if channels is None else channels.shape[1]
    fits = entries.dim() == 4 and entries.shape[0] == q.shape[0] and entries.shape[3] == width
    if not fits or q.shape[2] != 1 or q.shape[1] % entries.shape[1]:
        raise ValueError(
            f"estimate_topk takes one query q [B, H, 1, D] and entries [B, Hkv, any, {width}]; got "
            f"{list(q.shape)} and {list(entries.shape)}."
        )
    how = {"fraction": fraction, "page": page, "channels": channels, "reduce": reduce, "start": start}
    chosen: TokenLists = run("estimate_topk", IMPLS, impl, q, entries, softmax, length, k, **how)
    return chosen
