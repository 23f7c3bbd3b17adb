"""The base of mixers that remember their last tokens and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from .mixer import Mixer, Rotary, State, Transition


class LocalMixer(Mixer):
    """The state is a function of the last ``halo`` tokens, so that over ranks a shard knows its own."""

    halo: int | None = 0

    @property
    def state_dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype  # inputs are kept as they came: nothing adds up

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        return type(self).forward(self, hidden, state, mask)[1]

    def advance(self, state: State, transition: Transition) -> State:
        return transition
