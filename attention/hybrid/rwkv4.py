"""RWKV-4: attention without queries, whose keys lose weight with the distance, and its spiking form."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..partial import Partial, merge
from .decayed_softmax import decayed_softmax
from .geometry import Geometry
from .mixer import Mixer, Rotary, State, Transition
from .spikes import spikes
from .tokens import Tokens, shifted

_NOTHING = -1e30  # the logarithm of a sum without terms: finite, so that no difference is NaN


class Rwkv4(Mixer):
    """out_t = W_o (σ(r_t) ⊙ wkv_t), each channel for itself (RWKV, 2305.13048):

        wkv_t = (sum_(i < t) e^(k_i - (t - 1 - i) w) v_i + e^(u + k_t) v_t) / (the same without v)

    r, k and v are projections of μ x_t + (1 - μ) x_(t-1), each with its own learned μ; w = e^decay and u
    are learned. The state is x_t and the softmax over the tokens until t, as the logarithm of the
    denominator and the quotient. spiking: out_t are the spikes of leaky neurons that are fed with the
    output (SpikeGPT, 2302.13939), 0 or 1, with the neurons' potentials in the state; they are computed
    token by token, and not over ranks.

    Decays, u and μ begin spread over the channels. RoPE is not applied. Nothing of an attention's weights
    fits."""

    name: ClassVar[str] = "rwkv4"
    title: ClassVar[str] = "RWKV-4"
    paper: ClassVar[str] = "2305.13048"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, spiking: bool = False) -> None:
        super().__init__()
        size = self.hidden_size = geometry.hidden_size
        self.spiking, self.halo = spiking, None if spiking else 1
        self.key, self.value, self.receptance, self.output = (
            nn.Linear(size, size, bias=False) for _ in range(4)
        )
        place = torch.arange(size) / max(1, size - 1)
        self.mix = nn.Parameter(place.repeat(3, 1))  # μ of k, v, r
        self.decay = nn.Parameter(8 * place - 5)
        self.bonus = nn.Parameter(math.log(0.3) + (torch.arange(size) % 3 - 1) / 2)  # u

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        each = (self.hidden_size,)
        return ((1, self.hidden_size), each, each, *([each] if self.spiking else []))

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.decay.dtype, torch.float32)

    def initial_state(self, batch: int, device: torch.device) -> State:
        last, lse, *others = super().initial_state(batch, device)
        return (last, torch.full_like(lse, _NOTHING), *others)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        last, lse, mean, *potential = state or self.initial_state(len(hidden), hidden.device)
        tokens = Tokens(hidden, mask, None)
        previous, last = shifted(last, tokens.hidden, tokens.count)
        k, v, r = (
            p(torch.lerp(previous, tokens.hidden, mu.to(hidden.dtype)))
            for p, mu in zip((self.key, self.value, self.receptance), self.mix, strict=True)
        )
        wide = self.state_dtype
        wkv, past = decayed_softmax(
            k.to(wide),
            v.to(wide),
            self.decay.to(wide).exp(),
            self.bonus.to(wide),
            Partial(mean, lse),
            tokens.count,
        )
        out = self.output(r.sigmoid() * wkv.to(r.dtype))
        if self.spiking:
            fired, after = spikes(out.to(wide), potential[0], tokens.real)
            out, potential = fired, [after]
        return tokens.place(out.to(hidden.dtype)), (last, past.lse, past.out, *potential)

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        """The last token, the softmax over the shard alone, and the shard's number of tokens."""
        alone = (state[0], *self.initial_state(len(hidden), hidden.device)[1:])
        after = type(self).forward(self, hidden, alone, mask)[1]
        count = hidden.new_full((len(hidden),), hidden.shape[1]) if mask is None else mask.sum(1)
        return (*after, count.to(self.state_dtype))

    def advance(self, state: State, transition: Transition) -> State:
        last, lse, mean, count = transition
        before = state[1] - count[:, None] * self.decay.to(lse.dtype).exp()
        both = merge(Partial(state[2][..., None], before), Partial(mean[..., None], lse))
        return last, both.lse, both.out[..., 0]
