"""Attention in bfloat16 on the CPU out of torch's matrix products, where those outrun torch's own kernel.

A CPU with bf16 dot products (AVX512_BF16) multiplies bf16 matrices several times faster than the flash kernel
behind ``scaled_dot_product_attention`` does inside (400 against 80 GFLOP/s a core on a Zen 5). Such a product
is summed in float32, but its result is rounded to bf16, too coarse for logits. The rounding error is itself a
product: s = round(q k^T) and r = round(q k^T - s), which ``baddbmm(beta=-1)`` forms before it rounds, hold
q k^T to 16 bits together. Two such products for the logits, two for the values, are still faster.

A tile is up to 256 queries of one head by 2,048 keys: large enough that the passes over its logits come from
the second-level cache and that starting an operation costs little.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from ..partial import Partial
from ..softmax import Softmax
from .torch_private import cpu_has_amx, cpu_has_bf16_dots

_ROWS, _KEYS = 256, 2048
_FEWEST_ROWS, _FEWEST_KEYS = 128, 512  # below these, starting the operations costs more than is won
NARROW, _FEWEST_NARROW = 96, 256  # the rows that narrower heads need
_LOG2E = 1.4426950408889634


def serves(q: Tensor, k: Tensor, scale: float) -> bool:
    """Whether the products are there and worth it for q [B, H, Tq, D] against k [B, H, Tk, D]."""
    return (
        q.dtype == torch.bfloat16
        and q.shape[2] >= (_FEWEST_ROWS if q.shape[3] >= NARROW else _FEWEST_NARROW)
        and k.shape[2] >= _FEWEST_KEYS
        and scale > 0
        and _cpu_has_products()
    )


def _cpu_has_products() -> bool:
    # With AMX torch's own kernel multiplies in AMX tiles, too: there is nothing to win there.
    return cpu_has_bf16_dots() and not cpu_has_amx()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax: Softmax,
    *,
    causal: bool,
    mask: Tensor | None,
    first: int = 0,
    dtype: torch.dtype | None = None,
) -> Partial:
    """``kernel.attend`` over plain k, v [B, H, Tk, D], for the rows from ``first`` on. dtype: of the
    output."""
    b, h, tq, _ = q.shape
    dv = v.shape[3]
    out = torch.empty(b, h, tq - first, dv, dtype=dtype or q.dtype)
    lse = torch.empty(b, h, tq - first, dtype=torch.float32)
    space = _space()
    above = torch.ones(_ROWS, _ROWS, dtype=torch.bool).triu_(1) if causal else None
    hidden = None if mask is None else ~mask.expand(b, h, tq, -1)
    for i in range(b):
        for j in range(h):
            for a in range(first, tq, _ROWS):
                z = min(a + _ROWS, tq)
                rows = _Rows(q[i, j, a:z], softmax, space)
                if above is not None:
                    rows.read(k[i, j, :z], v[i, j, :z], above[: z - a, : z - a])
                else:
                    rows.read(k[i, j], v[i, j], None if hidden is None else hidden[i, j, a:z])
                lse[i, j, a - first : z - first] = rows.finish(out[i, j, a - first : z - first])
    return Partial(out, lse)


class _Space(threading.local):
    """A thread's room for one tile (5 MB), used again and again: memory fresh from the system costs more than
    the sums in it."""

    @torch.inference_mode(False)  # or only calls in inference mode could write to it
    def __init__(self) -> None:
        self.rounded = torch.empty(_ROWS * _KEYS, dtype=torch.bfloat16)
        self.logits, self.rest = torch.empty(_ROWS * _KEYS), torch.empty(_ROWS * _KEYS)


@functools.cache
def _space() -> _Space:
    return _Space()


class _Rows:
    """The running softmax of some queries [R, D] of one head (arXiv 2205.14135), in base 2."""

    def __init__(self, q: Tensor, softmax: Softmax, space: _Space):
        scale, softcap = softmax.scale, softmax.softcap
        self.q, self.softcap, self.space = q, softcap, space
        self.scale, self.bend = (scale, 1.0) if softcap is None else (1.0, scale / softcap)
        self.peak: Tensor | None = None  # [R, 1] float32, largest logit so far, before the scale

    def read(self, k: Tensor, v: Tensor, hidden: Tensor | None) -> None:
        """Take in keys [N, D] and values. hidden: [R, M] bool, True = not read, for the last M keys."""
        n = k.shape[0]
        for c in range(0, n, _KEYS):
            d = min(c + _KEYS, n)
            first = n if hidden is None else n - hidden.shape[1]  # the first key that not every row reads
            cut = None if hidden is None or d <= first else hidden[:, max(c, first) - first : d - first]
            self._tile(k[c:d], v[c:d], cut)

    def _tile(self, k: Tensor, v: Tensor, hidden: Tensor | None) -> None:
        r, n = self.q.shape[0], k.shape[0]
        space, area = self.space, self.q.shape[0] * k.shape[0]
        x = _product(
            self.q, k[None].transpose(1, 2), space.rounded[:area], space.rest[:area], space.logits[:area]
        )
        if self.softcap is not None:
            x.mul_(self.bend).tanh_().mul_(self.softcap)
        if hidden is not None:
            x[:, n - hidden.shape[1] :].masked_fill_(hidden, -torch.inf)
        peak = x.amax(-1, keepdim=True).clamp_(min=-1e30)  # a row that reads nothing must not give inf - inf
        if self.peak is not None:
            peak = torch.maximum(self.peak, peak)
            fade = ((self.peak - peak) * (self.scale * _LOG2E)).exp2_()
        weights = torch.add(peak * (-self.scale * _LOG2E), x, alpha=self.scale * _LOG2E, out=x).exp2_()
        total = weights.sum(-1, keepdim=True)
        weights = space.rounded[:area].view(r, n).copy_(weights)
        width = r * v.shape[1]
        sums = _product(
            weights, v[None], torch.empty(width, dtype=v.dtype), space.rest[:width], torch.empty(width)
        )
        if self.peak is None:
            self.out, self.total = sums, total
        else:
            self.out.mul_(fade).add_(sums)
            self.total.mul_(fade).add_(total)
        self.peak = peak

    def finish(self, out: Tensor) -> Tensor:
        """Write the normalised output to ``out`` [R, Dv]; -> lse [R]."""
        assert self.peak is not None
        out.copy_(self.out.div_(self.total.clamp(min=1e-38)))
        return (self.peak * self.scale + self.total.log())[:, 0]


def _product(a: Tensor, b: Tensor, rounded: Tensor, rest: Tensor, wide: Tensor) -> Tensor:
    """a [M, K] times b [K, N] in float32, written to ``wide`` [M * N]; ``rounded`` and ``rest`` are room."""
    shape = (1, a.shape[0], b.shape[2])
    rounded, rest, wide = rounded.view(shape), rest.view(shape), wide.view(shape)
    wide.copy_(torch.bmm(a[None], b, out=rounded))
    rest.copy_(rounded.baddbmm_(a[None], b, beta=-1))
    return wide.add_(rest)[0]
