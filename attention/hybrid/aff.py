"""Adaptive frequency filters: a filter of a sequence's frequencies that the frequencies themselves choose."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softshrink

from ..errors import SpecError
from ..ops.autocast import without_autocast
from .encoder import EncoderMixer, by_length
from .tokens import Tokens


class Aff(EncoderMixer):
    """out = F^-1 (X ⊙ shrink(W_2 ReLU(W_1 X + b_1) + b_2)) + x with X = F x over the tokens (AFF,
    2307.14008).

    W_1 and W_2 are complex and block-diagonal, with ``blocks`` blocks of channels; ReLU and the soft
    threshold of 0.01 are of real and imaginary parts. A row's transform is over its own tokens, without
    padding. The paper's transform is of a picture; this one is of a sequence.

    Raises SpecError for blocks that do not divide hidden_size.
    """

    name: ClassVar[str] = "aff"
    title: ClassVar[str] = "Adaptive frequency filters"
    paper: ClassVar[str] = "2307.14008"

    def __init__(self, hidden_size: int, *, blocks: int = 8) -> None:
        super().__init__()
        if blocks < 1 or hidden_size % blocks:
            raise SpecError(f"aff takes blocks that divide hidden_size {hidden_size}; got {blocks}.")
        self.hidden_size, self.blocks = hidden_size, blocks
        size = hidden_size // blocks
        # of two layers, real and imaginary
        self.weight = nn.Parameter(torch.randn(2, 2, blocks, size, size) / (2 * size) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(2, 2, blocks, size))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = Tokens(hidden, mask, None)
        x = tokens.hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        out = by_length(x, tokens.count, self._filtered).to(hidden.dtype)
        return tokens.place(out + tokens.hidden)

    @without_autocast
    def _filtered(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(x, dim=1, norm="ortho")
        parts = (
            torch.view_as_real(found).unflatten(2, (self.blocks, -1)).movedim(-1, 0)
        )  # [2, B, F, blocks, size]
        parts = self._linear(self._linear(parts, 0).relu(), 1)
        chosen = torch.complex(*softshrink(parts, 0.01)).flatten(2)
        return torch.fft.irfft(found * chosen, x.shape[1], dim=1, norm="ortho")

    def _linear(self, x: Tensor, layer: int) -> Tensor:
        """A complex linear map: x [2, B, F, blocks, size], real and imaginary parts."""
        (a, b), w, bias = x, self.weight[layer].to(x), self.bias[layer].to(x)
        times = [[torch.einsum("tfnc,ncd->tfnd", part, matrix) for matrix in w] for part in (a, b)]
        real, imaginary = times[0][0] - times[1][1], times[1][0] + times[0][1]
        return torch.stack([real, imaginary]) + bias[:, None, None]
