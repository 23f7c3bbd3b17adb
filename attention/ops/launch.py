"""What the Triton kernels share. Imported only by them: triton is optional, and slow to import."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kv import KV

INTERPRETED = bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1, read when triton was imported
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def cannot_launch(device: torch.device) -> list[str]:
    """Why no kernel can be launched on ``device``."""
    if device.type == "cuda" or INTERPRETED:
        return []
    return [f"the tensors are on {device.type}, not on CUDA, and TRITON_INTERPRET=1 is not set"]


def cannot_read(*tensors: Tensor, largest: int = 256) -> list[str]:
    """Why the kernels cannot read these tensors [..., D]: their type, their width, their layout."""
    reasons = []
    if any(t.dtype not in DTYPES for t in tensors):
        reasons.append(f"{tensors[0].dtype} is none of float16, bfloat16 and float32")
    elif len({t.dtype for t in tensors}) > 1:  # a matrix product takes one type
        reasons.append(f"the inputs differ in type: {', '.join(str(t.dtype) for t in tensors)}")
    if any(t.shape[-1] > largest for t in tensors):
        reasons.append(f"heads of {max(t.shape[-1] for t in tensors)} are wider than {largest}")
    return reasons


def cannot_attend(q: Tensor, kv: KV) -> list[str]:
    """Why the kernels cannot read these queries [..., D] against ``kv``: as for :func:`cannot_read`."""
    reasons = []
    if q.dtype not in DTYPES:
        reasons.append(f"{q.dtype} is none of float16, bfloat16 and float32")
    elif not q.dtype == kv.dtype == kv.value_dtype:  # a matrix product takes one type
        reasons.append(f"the inputs differ in type: {q.dtype}, {kv.dtype}, {kv.value_dtype}")
    if (width := max(kv.head_dim, kv.value_dim)) > 256:
        reasons.append(f"heads of {width} are wider than 256")
    return reasons


def no_gradient(*tensors: Tensor | KV) -> list[str]:
    """Why autograd cannot go through a kernel that has no backward."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return ["this kernel has no backward and an input needs a gradient"]
    return []


def wide(head_dim: int) -> int:
    """The power of two, at least 16, that a row of ``head_dim`` numbers is padded to in registers."""
    return max(16, triton.next_power_of_2(head_dim))


def tuned(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """``triton.autotune`` over a few configurations, its choice kept on disk (triton's cache folder).

    Under the interpreter, and where FARSPAN_AUTOTUNE=0, the first configuration is taken untimed.
    """
    if INTERPRETED or os.environ.get("FARSPAN_AUTOTUNE") == "0":
        configs = configs[:1]
    return triton.autotune(configs=list(configs), key=list(key), cache_results=True)


@triton.jit
def tanh(x):
    """tanh, stable at both ends, where libdevice is not at hand (the interpreter)."""
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def finish(acc, peak, total):
    """(out [M, WIDE_V], natural lse [M]) of the sums; (0, -inf) for rows that read nothing."""
    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    return acc / safe[:, None], tl.where(empty, -float("inf"), (peak + tl.log2(safe)) * LN2)
