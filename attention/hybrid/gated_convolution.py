"""A gated long convolution: Zoology's BaseConv, the plain form of H3, Hyena and RWKV's mixing."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from .geometry import Geometry
from .local_mixer import LocalMixer
from .long_convolution import long_convolution
from .mixer import Rotary, State
from .tokens import Tokens, follow


class GatedConvolution(LocalMixer):
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
            raise SpecError(f"base_conv has a filter of at least 1 token; got a length of {length}.")
        self.hidden_size, self.length = geometry.hidden_size, length
        self.halo = length - 1
        self.filter = nn.Parameter(torch.randn(self.hidden_size, length) / length**0.5)
        self.bias = nn.Parameter(torch.zeros(self.hidden_size))
        self.gate_proj = nn.Linear(self.hidden_size, self.hidden_size)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.length - 1, self.hidden_size),)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        """As ``Mixer.forward``. The convolution is a product of Fourier transforms in float32 or wider."""
        (before,) = state or self.initial_state(hidden.shape[0], hidden.device)
        tokens = Tokens(hidden, mask, None)
        u = tokens.hidden
        inputs, after = follow(before, u, tokens.count)  # [B, length - 1 + T, hidden]
        mixed = long_convolution(u if state is None else inputs, self.filter.T, u.shape[1])
        out = (mixed + self.bias) * self.gate_proj(u) + u
        return tokens.place(out), (after,)

    def step(self, hidden: Tensor, state: State, rotary: Rotary | None = None) -> tuple[Tensor, State]:
        inputs, after = follow(state[0], hidden[:, None], None)  # [B, length, hidden]
        mixed = torch.einsum("bth,ht->bh", inputs, self.filter.flip(1))
        out = (mixed + self.bias) * self.gate_proj(hidden) + hidden
        return out, (after,)
