"""A gated long convolution: Zoology's BaseConv, the plain form of H3, Hyena and RWKV's mixing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from .geometry import Geometry
from .mixer import Mixer, Rotary, State, Transition


class GatedConvolution(Mixer):
    """out = (h * u + b) ⊙ (u W) + u, with a learned filter h of each channel (BaseConv, 2312.04927).

    h [hidden, length] is the filter itself, not a function of positions. Output t is computed from the inputs
    u of the tokens t - length + 1 .. t, so the state is the last length - 1 inputs: a convolution of the
    sequence's own length keeps every input. Its mixing does not depend on the input, only the gate does.

    Nothing of an attention's weights fits it. Raises SpecError for a length below 1.
    """

    name: ClassVar[str] = "base_conv"
    title: ClassVar[str] = "BaseConv (gated long convolution)"
    paper: ClassVar[str] = "2312.04927"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, length: int = 64) -> None:
        super().__init__()
        if length < 1:
            raise SpecError(f"base_conv has a filter of at least 1 token; got length={length}.")
        self.hidden_size, self.length = geometry.hidden_size, length
        self.halo = length - 1
        self.filter = nn.Parameter(torch.randn(self.hidden_size, length) / length**0.5)
        self.bias = nn.Parameter(torch.zeros(self.hidden_size))
        self.gate_proj = nn.Linear(self.hidden_size, self.hidden_size)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.length - 1, self.hidden_size),)

    @property
    def state_dtype(self) -> torch.dtype:
        return self.filter.dtype  # inputs are kept as they came: nothing adds up

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        """As ``Mixer.forward``. The convolution is a product of Fourier transforms in float32 or wider."""
        (before,) = state or self.initial_state(hidden.shape[0], hidden.device)
        u, back = hidden, None
        if mask is not None:  # padding goes behind the real tokens, which then follow the state directly
            order = mask.logical_not().sort(dim=1, stable=True).indices
            u, back = _rows(hidden, order).masked_fill(_after(mask), 0), order.argsort(1)
        inputs = torch.cat([before.to(u), u], 1)  # [B, length - 1 + T, hidden]
        mixed = self._convolve(u if state is None else inputs, u.shape[1])
        out = (mixed + self.bias) * self.gate_proj(u) + u
        kept = inputs[:, inputs.shape[1] - self.length + 1 :]
        if mask is not None and back is not None:
            out = _rows(out, back)
            last = torch.arange(self.length - 1, device=u.device) + mask.sum(1, keepdim=True)
            kept = _rows(inputs, last)
        return out, (kept.to(before.dtype).clone(),)  # no view that would keep all inputs in memory

    def step(self, hidden: Tensor, state: State, rotary: Rotary | None = None) -> tuple[Tensor, State]:
        inputs = torch.cat([state[0].to(hidden), hidden[:, None]], 1)  # [B, length, hidden]
        mixed = torch.einsum("bth,ht->bh", inputs, self.filter.flip(1))
        out = (mixed + self.bias) * self.gate_proj(hidden) + hidden
        return out, (inputs[:, 1:].to(state[0].dtype).clone(),)

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        return type(self).forward(self, hidden, state, mask)[1]  # all of the state is local

    def advance(self, state: State, transition: Transition) -> State:
        return transition

    def _convolve(self, x: Tensor, count: int) -> Tensor:
        """[B, S, hidden] -> [B, count, hidden], the last y_t = sum_j filter_j x_(t - j), where x is 0 before
        its start."""
        wide = torch.promote_types(x.dtype, torch.float32)
        taps = self.filter[:, : x.shape[1]].to(wide)
        size = _quick(max(x.shape[1], count + taps.shape[1] - 1))  # what wraps around meets none of the last
        filtered = torch.fft.rfft(taps, size).T * torch.fft.rfft(x.to(wide), size, dim=1)
        return torch.fft.irfft(filtered, size, dim=1)[:, x.shape[1] - count : x.shape[1]].to(x.dtype)


def _after(mask: Tensor) -> Tensor:
    """[B, T, 1] bool: the places behind the real tokens of each row, once these come first."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places >= mask.sum(1, keepdim=True))[..., None]


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """x [B, S, hidden] at places [B, R] -> [B, R, hidden]."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _quick(size: int) -> int:
    """The next multiple of 32: Fourier transforms of sizes with large prime factors are slow."""
    return -(-size // 32) * 32
