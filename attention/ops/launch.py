"""What the Triton kernels share. Imported only by them: triton is optional, and slow to import."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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


def bucket(length: int) -> int:
    """The class of lengths whose calls share a tuned configuration: lengths up to 1,024 are 0, up to 4,096
    1, up to 16,384 2, and so on: each class ends at four times the length of the one before.

    It is an argument of each kernel whose work grows with the number of keys, and part of its tuning key, so
    that a warm-up with 64 tokens does not decide for 128K. A generation that passes the end of a class times
    the configurations in that step, once: the choice is kept in the process and on disk, and no later call
    of the class times anything. In a range of 128K keys this happens at most four times.
    """
    return max(0, (length - 1).bit_length() - 9) // 2


class Tuned(triton.KernelInterface):
    """A kernel with several configurations, of which ``triton.autotune`` takes the fastest for each tuning
    key; its choice is kept on disk (triton's cache folder).

    Under the interpreter, and where FARSPAN_AUTOTUNE=0, the first configuration is taken untimed. Inside
    ``configuration(n)`` the n-th is.
    """

    def __init__(self, kernel: Any, configs: Sequence[triton.Config], key: Sequence[str]) -> None:
        self.kernel, self.configs, self.key = kernel, list(configs), list(key)
        self.timed = triton.autotune(configs=self.configs, key=self.key, cache_results=True)(kernel)

    def run(self, *args: Any, **options: Any) -> Any:
        n = _configuration.get()
        if n is None and (INTERPRETED or os.environ.get("FARSPAN_AUTOTUNE") == "0"):
            n = 0
        if n is None:
            return self.timed.run(*args, **options)
        return self.kernel.run(*args, **options, **self.configs[n % len(self.configs)].all_kwargs())


_configuration: ContextVar[int | None] = ContextVar("farspan_configuration", default=None)


@contextmanager
def configuration(n: int) -> Iterator[None]:
    """Each tuned kernel takes its n-th configuration inside, untimed, beginning again after its last one: so
    that tests reach the forms that tuning may choose."""
    token = _configuration.set(n)
    try:
        yield
    finally:
        _configuration.reset(token)


def tuned(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Tuned]:
    """A decorator that makes a kernel a :class:`Tuned` one. key: names of its arguments; calls that differ in
    one of them are tuned apart."""
    return lambda kernel: Tuned(kernel, configs, key)


def row_starts(start: Tensor | None, device: torch.device) -> Tensor | None:
    """Each row's first valid position [B] as the kernels read it: on their device, one behind the other."""
    return None if start is None else start.to(device).contiguous()


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
