"""MambaMixer: a selective state space over the tokens, then one over the channels of each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from .geometry import Geometry
from .mamba2 import Mamba2
from .mixer import Mixer, Rotary, State, Transition


class MambaMixer(Mixer):
    """y = Mamba-2 over the tokens; z = Mamba-2 over the channels of c = a_1 x + a_2 y, forth and back; out
    = a_3 y + a_4 z (MambaMixer, 2403.19888).

    The channels of a token are read as a sequence of pieces of ``group`` numbers, from both ends, with
    weights of each direction; no other token is seen there. The paper weighs the outputs of all earlier
    layers too, which a mixer does not see: a_1 .. a_4, 1 at first, are of what this layer has. Its state
    spaces are Mamba-1's; here they are Mamba-2's. The state is that of the tokens' Mamba-2, which begins
    from attention as ``Mamba2`` does.

    Raises SpecError for a group that does not divide hidden_size.
    """

    name: ClassVar[str] = "mambamixer"
    title: ClassVar[str] = "MambaMixer"
    paper: ClassVar[str] = "2403.19888"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, group: int = 8, state: int = 16) -> None:
        super().__init__()
        if group < 1 or geometry.hidden_size % group:
            raise SpecError(
                f"mambamixer takes a group that divides hidden_size {geometry.hidden_size}; got {group}."
            )
        self.hidden_size, self.group = geometry.hidden_size, group
        self.tokens = Mamba2(geometry)
        piece = Geometry(hidden_size=group, num_heads=1, num_kv_heads=1, head_dim=group, eps=geometry.eps)
        self.forth, self.back = (Mamba2(piece, expand=2, headdim=2 * group, state=state) for _ in range(2))
        self.shares = nn.Parameter(torch.ones(4))
        self.halo = self.tokens.halo

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.tokens.state_shapes

    @property
    def state_dtype(self) -> torch.dtype:
        return self.tokens.state_dtype

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        y, after = self.tokens(hidden, state, mask, rotary)
        return self._channels(hidden, y), after

    def _channels(self, hidden: Tensor, y: Tensor) -> Tensor:
        """The outputs of tokens [B, T, hidden] whose token mixer has returned ``y``."""
        of_x, of_y, kept, mixed = self.shares.to(y.dtype)
        pieces = (
            (of_x * hidden + of_y * y).unflatten(2, (-1, self.group)).flatten(0, 1)
        )  # [B * T, pieces, group]
        z = self.forth(pieces)[0] + self.back(pieces.flip(1))[0].flip(1)
        return kept * y + mixed * z.reshape(y.shape)

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        self.tokens.initialise_from(weights)

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        return self.tokens.transition(hidden, state, mask, rotary)

    def shard(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> tuple[Transition, Callable[[State], Tensor]]:
        change, outputs = self.tokens.shard(hidden, state, mask, rotary)
        return change, lambda before: self._channels(hidden, outputs(before))

    def advance(self, state: State, transition: Transition) -> State:
        return self.tokens.advance(state, transition)
