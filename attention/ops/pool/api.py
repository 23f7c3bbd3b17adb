from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..dispatch import Impls, LazyImpl, run
from . import eager, reference

IMPLS: Impls = {
    "reference": reference.pool,
    "eager": eager.pool,
    "triton": LazyImpl(__package__, "pool"),
}
SEGMENTS: Impls = {
    "reference": reference.pool_segments,
    "eager": eager.pool_segments,
    "triton": LazyImpl(__package__, "pool_segments"),
}
MODES = ("mean", "min", "max", "length_normalised")


def pool(
    x: Tensor,
    block: int,
    *,
    mode: str | Sequence[str],
    start: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Pool x [B, Hkv, T, D] over blocks of ``block`` positions -> [B, Hkv, ceil(T / block), D] in the dtype
    of x.

    mode: "mean" (accumulated in float32), "min", "max", or "length_normalised" (arXiv 2510.24606: the mean
    times the square root of the block's length); or several of them, laid side by side along D in one reading
    of x (2410.13276 pools so): [.., len(mode) * D]. Block j of row b begins at start[b] + j * block (start
    [B], each row's first valid position; None: 0); a last block that is not full is pooled over what it
    holds, blocks past the end of a padded row are zero. Raises ValueError for an unknown mode or a block
    below 1.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"pool takes floating x [B, Hkv, T, D]; got {list(x.shape)} of {x.dtype}.")
    if start is not None and start.shape != x.shape[:1]:
        raise ValueError(f"pool takes start [B] = [{x.shape[0]}]; got {list(start.shape)}.")
    if block < 1:
        raise ValueError(f"pool needs blocks of at least 1 position; got {block}.")
    return run("pool", IMPLS, impl, x, block, modes=_modes("pool", mode), start=start)


def pool_segments(x: Tensor, bounds: Tensor, *, mode: str | Sequence[str], impl: str = "auto") -> Tensor:
    """Pool x [B, Hkv, T, D] over segments of any length -> [B, Hkv, S, len(mode) * D] in the dtype of x.

    bounds: [B, S + 1] or [B, Hkv, S + 1] integers, ascending positions from 0 to T: segment s is bounds[s] ..
    bounds[s + 1] - 1. An empty segment gives zeros. mode: as for :func:`pool`. What the bounds hold is not
    checked (they are read on the device alone). Raises ValueError for an unknown mode or shapes that do not
    fit.
    """
    if bounds.shape[:-1] not in (x.shape[:1], x.shape[:2]) or bounds.shape[-1] < 1:
        raise ValueError(
            f"pool_segments takes bounds [B, S + 1] or [B, Hkv, S + 1] for x [B, Hkv, T, D] {list(x.shape)}; "
            f"got {list(bounds.shape)}."
        )
    if bounds.dtype.is_floating_point:
        raise ValueError(f"pool_segments takes bounds of an integer type; got {bounds.dtype}.")
    bounds = (bounds if bounds.dim() == 3 else bounds[:, None]).expand(*x.shape[:2], -1)
    return run("pool_segments", SEGMENTS, impl, x, bounds, modes=_modes("pool_segments", mode))


def _modes(op: str, mode: str | Sequence[str]) -> tuple[str, ...]:
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    for one in modes:
        if one not in MODES:
            raise ValueError(f"{op} knows the modes {', '.join(MODES)}; got {one!r}.")
    if not modes or len(set(modes)) < len(modes):
        raise ValueError(f"{op} needs one or more of {', '.join(MODES)}, each once; got {modes}.")
    return modes
