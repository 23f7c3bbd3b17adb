"""TSMixer: a matrix over the tokens and a network over the channels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import FarspanError, SpecError
from .encoder import EncoderMixer
from .tokens import Tokens


class TSMixer(EncoderMixer):
    """u = ReLU(W x + b) over the tokens, each channel for itself, out = u + W_2 ReLU(W_1 (x + u) + b_1) + b_2
    (TSMixer, 2303.06053).

    With the residual of its layer that is the paper's block without norms and dropout. W [length, length]
    and b are of positions, which count from a row's first token; a shorter row uses their first rows and
    columns. W_1 and W_2 keep the size.

    Raises SpecError for a length below 1, and in a call FarspanError for more tokens than ``length``.
    """

    name: ClassVar[str] = "tsmixer"
    title: ClassVar[str] = "TSMixer"
    paper: ClassVar[str] = "2303.06053"

    def __init__(self, hidden_size: int, *, length: int = 512) -> None:
        super().__init__()
        if length < 1:
            raise SpecError(f"tsmixer takes a length of at least 1 token; got {length}.")
        self.hidden_size, self.length = hidden_size, length
        self.over_tokens = nn.Linear(length, length)
        self.over_channels = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        n = hidden.shape[1]
        if n > self.length:
            raise FarspanError(
                f"tsmixer has weights for {self.length} tokens; this call has {n}: give it a longer length."
            )
        tokens = Tokens(hidden, mask, None)
        weight, bias = self.over_tokens.weight[:n, :n], self.over_tokens.bias[:n]
        u = (torch.einsum("ts,bsc->btc", weight, tokens.hidden) + bias[:, None]).relu().to(hidden.dtype)
        return tokens.place(u + self.over_channels(tokens.hidden + u))
