"""The gated convolution block of MambaOut: Mamba's block without its state space."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..errors import SpecError
from .geometry import Geometry
from .local_mixer import LocalMixer
from .mixer import Rotary, State
from .short_convolution import ShortConvolution
from .tokens import Tokens


class GatedCNN(LocalMixer):
    """out = W_o (GELU(g) ⊙ [i, conv(c)]) with g, i, c = W x (MambaOut, 2405.07992).

    g has expand * hidden_size numbers, rounded down, c as many as a hidden state, and i the rest, which
    passes by the convolution. The convolution is of each channel for itself, over the last ``conv`` tokens;
    the paper's is centred on a pixel, and this one is causal. It is the control of a comparison of state
    spaces: what a short convolution and a gate do without a state. Nothing of an attention's weights fits
    it.

    Raises SpecError for a conv below 1 and for an expand below 1 or without limit.
    """

    name: ClassVar[str] = "gated_conv"
    title: ClassVar[str] = "Gated CNN (MambaOut)"
    paper: ClassVar[str] = "2405.07992"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, expand: float = 2.6667, conv: int = 7) -> None:
        super().__init__()
        if conv < 1 or not 1 <= expand < torch.inf:
            raise SpecError(f"gated_conv takes conv and expand of at least 1; got {conv=}, {expand=}.")
        size = self.hidden_size = geometry.hidden_size
        self.width = int(expand * size)
        self.in_proj = nn.Linear(size, 2 * self.width)
        self.conv = ShortConvolution(size, conv, bias=True, linear=True)
        self.out_proj = nn.Linear(self.width, size)
        self.halo = conv - 1

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.conv.state_shape,)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        (before,) = state or self.initial_state(len(hidden), hidden.device)
        tokens = Tokens(hidden, mask, None)
        n, size = self.width, self.hidden_size
        g, i, c = self.in_proj(tokens.hidden).split([n, n - size, size], 2)
        c, after = self.conv(c, before, tokens.count)
        return tokens.place(self.out_proj(gelu(g) * torch.cat([i, c], 2))), (after,)
