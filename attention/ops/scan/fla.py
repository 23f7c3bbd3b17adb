"""``scan`` by flash-linear-attention's kernels, where that package is installed: an alternative and a rival.

It is never chosen by "auto". Its chunks are of 64 tokens, whatever is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from .. import library


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *, mask: Tensor | None, **how: object
) -> list[str]:
    """Why flash-linear-attention cannot run these arguments, one clause each."""
    reasons = library.cannot_call("fla", "flash-linear-attention", v)
    if mask is not None:
        reasons.append("it knows no mask; cut the padding away and give cu_seqlens")
    return reasons


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    beta: Tensor | None,
    scale: float,
    state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    group = v.shape[1] // q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q.repeat_interleave(group, 1), k.repeat_interleave(group, 1), v))
    how: dict[str, Any] = {"scale": scale, "initial_state": state, "cu_seqlens": cu_seqlens}
    if log_decay is not None:
        how["g"] = log_decay.transpose(1, 2)
    if beta is not None:
        how["beta"] = beta.transpose(1, 2)
    name = "simple_gla" if beta is None else "delta_rule" if log_decay is None else "gated_delta_rule"
    if log_decay is not None and log_decay.dim() == 4:
        name = "gla"
    run = getattr(importlib.import_module(f"fla.ops.{name}"), f"chunk_{name}")
    out, end = run(q, k, v, output_final_state=True, **how)
    return out.transpose(1, 2), end
