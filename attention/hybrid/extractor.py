"""Extractors: a learned matrix for each distance in place of attention."""

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


class Extractor(LocalMixer):
    """out_t = W_o ((sum_j x_(t - j) W_j) ⊙ (A x_t + a)), with a learned matrix W_j for each of the last
    ``length`` tokens (the Extractors, 2308.07661).

    The paper's strongest form weighs earlier tokens by their distance alone and adjusts the sum by the
    token itself. Its exact formula we have not verified: the element-wise adjustment and the projection are
    our choice. It has length * hidden_size^2 weights. The state is the last length - 1 inputs. Nothing of
    an attention's weights fits.

    Raises SpecError for a length below 1.
    """

    name: ClassVar[str] = "extractor"
    title: ClassVar[str] = "Extractor"
    paper: ClassVar[str] = "2308.07661"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, length: int = 8) -> None:
        super().__init__()
        if length < 1:
            raise SpecError(f"extractor takes a length of at least 1 token; got {length}.")
        size = self.hidden_size = geometry.hidden_size
        self.length, self.halo = length, length - 1
        self.extract = nn.Parameter(torch.randn(length, size, size) / (length * size) ** 0.5)
        self.adjust = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

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
        (before,) = state or self.initial_state(len(hidden), hidden.device)
        tokens = Tokens(hidden, mask, None)
        inputs, after = follow(before, tokens.hidden, tokens.count)
        mixed = long_convolution(tokens.hidden if state is None else inputs, self.extract, hidden.shape[1])
        return tokens.place(self.out_proj(mixed * self.adjust(tokens.hidden))), (after,)
