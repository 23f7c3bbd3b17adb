"""Choosing an implementation by name; nothing falls back silently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import Unsupported


def choose(
    op: str, impls: Mapping[str, Callable[..., Any]], impl: str, device: torch.device
) -> Callable[..., Any]:
    """The implementation of ``op`` called ``impl``; "auto" prefers triton on CUDA and eager torch
    elsewhere."""
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and "triton" in impls else "eager"
    if impl not in impls:
        raise Unsupported(
            f"{op} has no implementation {impl!r}", [f"it has {', '.join(sorted(impls))} and auto"]
        )
    return impls[impl]


def check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None) -> None:
    """Refuse shapes that do not belong together: q [B, H, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv],
    start [B]."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"{op} takes q [B, H, Tq, D] and k, v [B, Hkv, Tk, D]; got {q.dim()}-D, {k.dim()}-D, {v.dim()}-D."
        )
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{op} got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, which do not fit together."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{op} needs a whole number of query heads per KV head; got {q.shape[1]} and {k.shape[1]}."
        )
    if start is not None and start.shape != (q.shape[0],):
        raise ValueError(
            f"{op} takes start [B] = [{q.shape[0]}], each row's first valid position; got "
            f"{list(start.shape)}."
        )
