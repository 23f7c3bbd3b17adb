"""The Legendre memory: a fixed linear recurrence that keeps the last tokens as coefficients of
polynomials."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..ops.autocast import without_autocast
from .geometry import Geometry
from .long_convolution import long_convolution
from .mixer import Mixer, Rotary, State
from .tokens import Tokens, follow


class Lmu(Mixer):
    """u_t = ReLU(w . x_t + c), m_t = Ā m_(t-1) + B̄ u_t, out_t = W_o ReLU(W [m_t, x_t] + b) (parallel LMU,
    2102.11417; LMUFormer, 2402.04882).

    Ā and B̄ are the zero-order hold of A_ij = (2i + 1) / length * (-1 if i < j else (-1)^(i - j + 1)) and
    B_i = (2i + 1) (-1)^i / length: m holds the last ``length`` values of u as ``order`` Legendre
    coefficients. They are not learned. ``forward`` is a convolution with the impulse response Ā^j B̄, by
    Fourier transforms. The state is m. W_o is ours: without it a layer could only add to its residual.
    Nothing of an attention's weights fits.

    Raises SpecError for an order or a length below 1.
    """

    name: ClassVar[str] = "lmu"
    title: ClassVar[str] = "Legendre memory unit"
    paper: ClassVar[str] = "2402.04882"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, order: int = 32, length: int = 256) -> None:
        super().__init__()
        if min(order, length) < 1:
            raise SpecError(f"lmu takes an order and a length of at least 1; got {order=}, {length=}.")
        size = self.hidden_size = geometry.hidden_size
        self.order, self.length = order, length
        self.encode = nn.Linear(size, 1)
        self.hidden = nn.Linear(order + size, size)
        self.out_proj = nn.Linear(size, size)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.order,),)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.encode.weight.dtype, torch.float32)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        (before,) = state or self.initial_state(len(hidden), hidden.device)
        tokens, length = Tokens(hidden, mask, None), hidden.shape[1]
        a, b = (x.to(before) for x in legendre(self.order, self.length))
        u = self.encode(tokens.hidden).relu().to(before.dtype)  # [B, T, 1]
        m = long_convolution(u, powers(a, b[None], length)[0], length)
        if state is not None:
            m = m + powers(a, before, length + 1)[:, 1:]
        out = self.out_proj(self.hidden(torch.cat([m.to(hidden.dtype), tokens.hidden], 2)).relu())
        after = follow(before[:, None], m, tokens.count)[1][:, 0]
        return tokens.place(out), (after,)


@lru_cache(maxsize=16)
def legendre(order: int, length: int) -> tuple[Tensor, Tensor]:
    """Ā [order, order] and B̄ [order] in float64."""
    i = torch.arange(order, dtype=torch.float64)
    sign = 1 - 2 * (i % 2)  # (-1)^i
    scale = (2 * i + 1) / length
    a = scale[:, None] * torch.where(i[:, None] < i, -1.0, -sign[:, None] * sign)
    both = torch.zeros(order + 1, order + 1, dtype=torch.float64)
    both[:-1, :-1], both[:-1, -1] = a, scale * sign
    held = torch.linalg.matrix_exp(both)  # the exponential of [[A, B], [0, 0]] has both in its upper rows
    return held[:-1, :-1], held[:-1, -1]


@without_autocast
def powers(a: Tensor, x: Tensor, count: int) -> Tensor:
    """x, a x, a^2 x, ...: a [N, N], x [B, N] -> [B, count, N], in log2(count) products."""
    found = x[:, None]
    while found.shape[1] < count:
        found = torch.cat([found, found @ a.T], 1)
        a = a @ a
    return found[:, :count]
