"""FNet: a Fourier transform in place of attention."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .encoder import EncoderMixer, by_length
from .tokens import Tokens


class FNet(EncoderMixer):
    """out = Re F_tokens F_channels x, without weights (FNet, 2105.03824).

    A row's transform is over its own tokens, without padding. scaled: divide by sqrt(tokens * channels), so
    that outputs are as large as inputs; the paper does not, because a norm follows its sum with the
    residual."""

    name: ClassVar[str] = "fnet"
    title: ClassVar[str] = "FNet"
    paper: ClassVar[str] = "2105.03824"

    def __init__(self, hidden_size: int, *, scaled: bool = True) -> None:
        super().__init__()
        self.hidden_size, self.norm = hidden_size, "ortho" if scaled else "backward"

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = Tokens(hidden, mask, None)
        x = tokens.hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        out = by_length(x, tokens.count, lambda rows: torch.fft.fft2(rows, norm=self.norm).real)
        return tokens.place(out.to(hidden.dtype))
