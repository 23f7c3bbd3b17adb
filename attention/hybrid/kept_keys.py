"""The base of mixers whose state ends with keys and values that grow with the tokens."""

from __future__ import annotations

from torch import Tensor

from .growing import Growing, places
from .mixer import Rotary, State, Transition
from .projections import Projected


class KeepsKeys(Projected):
    """The state is (..., keys, values, tokens): keys and values [B, n, Hkv, D] with one entry for each
    ``every`` tokens, in the dtype of the weights, and the number of tokens of each row. Over ranks, the
    transition of a shard is its own entries; its size grows with the shard."""

    halo: int | None = 0
    every = 1

    @property
    def growing(self) -> tuple[Growing, ...]:
        return (Growing(shape=self.key_shape, dtype=self.k_proj.weight.dtype, every=self.every),) * 2

    def keys_of(
        self, hidden: Tensor, state: State, mask: Tensor | None, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """The keys and values [B, T, Hkv, D] of a call's tokens."""
        return self.project(hidden, rotary)[1:]

    def skip(self, state: State, tokens: Tensor) -> State:
        return (*state[:-1], state[-1] + tokens)

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        at = places(state[-1], mask, hidden.shape[1])
        made = zip(self.growing, self.keys_of(hidden, state, mask, rotary), strict=True)
        return (*(part.own(x, at) for part, x in made), at.end)

    def advance(self, state: State, transition: Transition) -> State:
        *others, keys, values, tokens = state
        k, v, end = transition
        part, _ = self.growing
        return (*others, part.join(keys, k, tokens, end), part.join(values, v, tokens, end), end)
