"""Shared by the tests of operations: an oracle apart from the package, random inputs, law 5's bound."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.attention.kv import KV
from farspan.attention.partial import Partial


@dataclass(frozen=True)
class Run:
    """One implementation of an operation, on one device, in one dtype."""

    impl: str
    device: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.impl}-{self.device}-{str(self.dtype).removeprefix('torch.')}"

    def to(self, x: Any) -> Any:
        """A tensor, or whatever holds tensors (an index, keys and values), on the run's device."""
        if isinstance(x, Tensor):
            return x.to(self.device)
        if isinstance(x, KV):
            return x.map(self.to)
        if is_dataclass(x):
            return type(x)(**{f.name: self.to(getattr(x, f.name)) for f in fields(x)})
        return type(x)(self.to(one) for one in x) if isinstance(x, tuple) else x


def every_run(*, triton: bool = True) -> pytest.MarkDecorator:
    """Parametrise ``run`` over implementations, devices and dtypes.

    Without a GPU, Triton's kernels run under its interpreter, whose bf16 matrix products are wrong (3.9.0):
    bf16 is for the runs marked ``gpu``.
    """
    runs: list[Any] = [Run("eager", "cpu", torch.float32), Run("eager", "cpu", torch.bfloat16)]
    if triton:
        runs += [Run("triton", "cpu", torch.float32), Run("triton", "cpu", torch.float16)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for impl in ("eager", "triton") if triton else ("eager",):
            runs.append(pytest.param(Run(impl, "cuda", dtype), marks=pytest.mark.gpu))
    return pytest.mark.parametrize("run", runs, ids=str)


def oracle(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float, softcap: float | None = None
) -> Partial:
    """softmax(scale q k^T) v in float64 over the pairs of mask [B, 1 | Hkv | H, Tq, Tk]; differentiable."""
    h = q.shape[1]
    mask = mask.repeat_interleave(h // mask.shape[1], 1)
    key, value = (x.double().repeat_interleave(h // k.shape[1], 1) for x in (k, v))
    logits = torch.einsum("bhqd,bhkd->bhqk", q.double(), key) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # NaN in a key or value that no query of the head reads must not count, not even times zero.
    logits = torch.where(mask, logits, -torch.inf)
    value = torch.where(mask.any(2)[..., None], value, 0.0)
    alone = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(torch.where(alone, 0.0, logits), -1)
    weights = torch.where(mask, weights, 0.0)
    lse = torch.where(alone[..., 0], -torch.inf, torch.logsumexp(torch.where(alone, 0.0, logits), -1))
    return Partial(torch.einsum("bhqk,bhkd->bhqd", weights, value), lse)


def brute_mask(tq: int, tk: int, starts: list[int], *, window: int | None = None, sinks: int = 0) -> Tensor:
    """[B, 1, Tq, Tk], pair by pair: start <= j <= position, and within the window or among the sinks."""
    mask = torch.zeros(len(starts), 1, tq, tk, dtype=torch.bool)
    for b, first in enumerate(starts):
        for i in range(tq):
            p = tk - tq + i
            low = first if window is None else max(first, p - window + 1)
            mask[b, 0, i, low : p + 1] = True
            mask[b, 0, i, first : min(first + sinks, p + 1)] = True
    return mask


def make_qkv(
    b: int,
    h: int,
    hkv: int,
    tq: int,
    tk: int,
    d: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    roomy: bool = True,
    starts: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v. roomy: k, v view a larger buffer whose other rows are NaN. starts: so is padding."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(b, h, tq, d, generator=generator).to(dtype)
    pair = []
    for _ in range(2):
        room = torch.full((b, hkv, tk + (37 if roomy else 0), d), torch.nan, dtype=dtype)
        x = room[:, :, :tk]
        x[:] = torch.randn(b, hkv, tk, d, generator=generator).to(dtype)
        for row, first in enumerate(starts or []):
            x[row, :, :first] = torch.nan
        pair.append(x)
    return q, pair[0], pair[1]


def assert_reference(got: Partial, truth: Partial) -> None:
    """A reference computes in float32 and rounds its output once."""
    empty = _assert_empty_rows_agree(got, truth)
    rounding = torch.finfo(got.out.dtype).eps / 2 if got.out.dtype.itemsize < 4 else 0.0
    for name, eps in (("out", rounding), ("lse", 0.0)):
        a, t = (getattr(p, name).double()[~empty] for p in (got, truth))
        error, allowed = (a - t).abs(), eps * t.abs() + 32 * torch.finfo(torch.float32).eps
        assert bool((error <= allowed).all()), f"{name}: error {error.max():.2e}"


def assert_law_5(got: Partial, same_dtype: Partial, truth: Partial) -> None:
    """error(got) <= 2 x error(the same-dtype reference), both against float64, plus a rounding or two.

    An error of the lse is a relative error of the weights. The library's 16-bit kernel is allowed 1/32 of a
    rounding there: it takes exponentials to 20 bits (about 6e-5 was measured).
    """
    got = Partial(got.out.cpu(), got.lse.cpu())
    empty = _assert_empty_rows_agree(got, truth)
    dtype = same_dtype.out.dtype
    eps = torch.finfo(torch.float32).eps
    low = torch.finfo(dtype).eps / 32 if dtype.itemsize < 4 else 0.0
    for name, tiny in (("out", 2 * eps), ("lse", 2 * eps + low)):
        a, r, t = (getattr(p, name).double()[~empty] for p in (got, same_dtype, truth))
        if t.numel() == 0:
            continue
        assert bool(a.isfinite().all()), f"{name} is not finite"
        scale = 1.0 if name == "lse" and low else 1 + t.abs().max()
        error, allowed = (a - t).abs().max(), 2 * (r - t).abs().max() + tiny * scale
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def _assert_empty_rows_agree(got: Partial, truth: Partial) -> Tensor:
    empty = truth.lse == -torch.inf
    assert torch.equal(got.lse == -torch.inf, empty), "rows that read nothing have lse -inf, and no others"
    assert bool((got.out[empty] == 0).all()), "rows that read nothing give zeros"
    return empty


def assert_grads_equal(got: list[Tensor], want: list[Tensor], rtol: float = 1e-9) -> None:
    for name, a, b in zip("qkv", got, want, strict=True):
        assert bool(a.isfinite().all()), f"d{name} is not finite"
        assert (a - b).abs().max() <= rtol * (1 + b.abs().max()), f"d{name} differs"
