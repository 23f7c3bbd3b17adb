from __future__ import annotations

from torch import Tensor

from ..dispatch import Optional, run
from . import eager, reference

IMPLS = {
    "reference": reference.top_k,
    "eager": eager.top_k,
    "triton": Optional(__package__, "top_k"),
}


def top_k(scores: Tensor, k: int, *, order: str = "position", impl: str = "auto") -> Tensor:
    """Positions of the k highest scores along the last dimension of scores [..., N]; equal scores go to the
    lowest position.

    order: "position" (ascending) or "score" (descending; equal scores by position). -> [..., min(k, N)]
    int64.
    Raises ValueError for k < 1.
    """
    if k < 1:
        raise ValueError(f"top_k needs k of at least 1; got {k}.")
    if order not in ("position", "score"):
        raise ValueError(f"top_k orders by 'position' or 'score'; got {order!r}.")
    return run("select", IMPLS, impl, scores, min(k, scores.shape[-1]), order=order)
