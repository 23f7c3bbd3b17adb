"""Aaren: attention as a recurrence, the query of each head learned."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.autocast import without_autocast
from ..partial import Partial, merge
from .geometry import Geometry
from .mixer import Mixer, Rotary, State, Transition
from .prefix_softmax import prefix_softmax


class Aaren(Mixer):
    """out_t = W_o sum_{j <= t} softmax_j(scale * q . k_j) v_j with one learned query q per head (arXiv
    2405.13956, without public code).

    The query does not depend on the token, so the softmax over the first t tokens is a prefix sum: the
    largest logit m, the sum u of exp(logit - m) and the sum w of the values weighed so. Two adjacent parts
    join by ``merge``; the state keeps (m, u, w) as the pair that ``merge`` takes, lse = m + ln u [H] and
    out = w / u [H, D], of constant size. ``forward`` computes chunks of tokens by a matrix product, and joins
    them in O(log chunks) steps of the parallel prefix sum.

    A layer cannot look up what it is asked for, because no query depends on the input: expect near chance in
    associative recall (MQAR). RoPE is not applied, for a fixed query has no position. Of the attention
    replaced it takes the projections of keys, values and outputs.
    """

    name: ClassVar[str] = "aaren"
    title: ClassVar[str] = "Aaren"
    paper: ClassVar[str] = "2405.13956"
    from_geometry: ClassVar[bool] = True
    halo = 0

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        g = self.geometry = geometry
        self.hidden_size = g.hidden_size
        self.query = nn.Parameter(torch.randn(g.num_heads, g.head_dim))
        self.k_proj = nn.Linear(g.hidden_size, g.num_kv_heads * g.head_dim, g.bias)
        self.v_proj = nn.Linear(g.hidden_size, g.num_kv_heads * g.head_dim, g.bias)
        self.o_proj = nn.Linear(g.num_heads * g.head_dim, g.hidden_size, g.out_bias)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.geometry.num_heads,), (self.geometry.num_heads, self.geometry.head_dim)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.query.dtype, torch.float32)

    def initial_state(self, batch: int, device: torch.device) -> State:
        lse, out = super().initial_state(batch, device)
        return torch.full_like(lse, -torch.inf), out

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        lse, out = state or self.initial_state(len(hidden), hidden.device)
        outs, after = prefix_softmax(*self._scored(hidden), Partial(out, lse), mask)
        return self.o_proj(outs.transpose(1, 2).flatten(2).to(hidden.dtype)), (after.lse, after.out)

    def step(self, hidden: Tensor, state: State, rotary: Rotary | None = None) -> tuple[Tensor, State]:
        scores, values = self._scored(hidden[:, None])
        lse, out = state
        joined = merge(Partial(out, lse), Partial(values[:, :, 0], scores[:, :, 0]))
        return self.o_proj(joined.out.flatten(1).to(hidden.dtype)), (joined.lse, joined.out)

    def transition(
        self, hidden: Tensor, state: State, mask: Tensor | None = None, rotary: Rotary | None = None
    ) -> Transition:
        """The state of the shard alone."""
        return type(self).forward(self, hidden, None, mask)[1]

    def advance(self, state: State, transition: Transition) -> State:
        joined = merge(Partial(state[1], state[0]), Partial(transition[1], transition[0]))
        return joined.lse, joined.out

    def _scored(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [B, T, hidden] -> the logits [B, H, T] and the values [B, H, T, D], in the state's dtype."""
        g = self.geometry
        k, v = (
            p(hidden).unflatten(2, (-1, g.head_dim)).transpose(1, 2).to(self.state_dtype)
            for p in (self.k_proj, self.v_proj)
        )
        query = self.query.to(k).unflatten(0, (g.num_kv_heads, -1))
        return logits(query, k).flatten(1, 2) * g.softmax_scale, v.repeat_interleave(
            g.num_heads // g.num_kv_heads, 1
        )


@without_autocast
def logits(query: Tensor, k: Tensor) -> Tensor:
    """query [Hkv, G, D] . k [B, Hkv, T, D] -> [B, Hkv, G, T]."""
    return torch.einsum("hgd,bhtd->bhgt", query, k)
