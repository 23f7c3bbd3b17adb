from __future__ import annotations

from torch import Tensor

from ..dispatch import Optional, run
from . import eager, reference

IMPLS = {
    "reference": reference.pool,
    "eager": eager.pool,
    "triton": Optional(__package__, "pool"),
}
MODES = ("mean", "min", "max")


def pool(x: Tensor, block: int, *, mode: str, start: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Pool x [B, Hkv, T, D] over blocks of ``block`` positions -> [B, Hkv, ceil(T / block), D] in the dtype
    of x.

    mode: "mean" (accumulated in float32), "min" or "max". Block j of row b begins at start[b] + j * block
    (start [B], each row's first valid position; None: 0); a last block that is not full is pooled over what
    it holds, blocks past the end of a padded row are zero. Raises ValueError for an unknown mode or a block
    below 1.
    """
    if mode not in MODES:
        raise ValueError(f"pool knows the modes {', '.join(MODES)}; got {mode!r}.")
    if block < 1:
        raise ValueError(f"pool needs blocks of at least 1 position; got {block}.")
    return run("pool", IMPLS, impl, x, block, mode=mode, start=start)
