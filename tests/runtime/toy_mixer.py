"""A mixer for tests: linear attention with a decay per head and short memory of the last token."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from farspan.attention.errors import SpecError
from farspan.attention.hybrid import Geometry, Mixer
from farspan.attention.hybrid.mixer import Rotary, State
from farspan.attention.ops.scan import scan


class Toy(Mixer):
    """S_t = exp(g) S_(t-1) + k_t v_t^T, out = q S, by the projections of the attention; ``bound`` limits the
    keys. The decays g are a buffer that is not saved."""

    name: ClassVar[str] = "toy"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, bound: float = 1.0) -> None:
        super().__init__()
        g = self.geometry = geometry
        if g.head_dim > 16:
            raise SpecError(f"toy takes a head_dim up to 16; got {g.head_dim}.")
        self.hidden_size, self.bound = g.hidden_size, bound
        self.q_proj = nn.Linear(g.hidden_size, g.num_heads * g.head_dim, bias=g.bias)
        self.k_proj, self.v_proj = (
            nn.Linear(g.hidden_size, g.num_kv_heads * g.head_dim, bias=g.bias) for _ in range(2)
        )
        self.o_proj = nn.Linear(g.num_heads * g.head_dim, g.hidden_size, bias=g.out_bias)
        self.gain = nn.Parameter(torch.ones(g.num_heads))
        self.register_buffer("decay", -torch.arange(1.0, g.num_heads + 1) / 10, persistent=False)

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        g = self.geometry
        return ((g.num_heads, g.head_dim, g.head_dim),)

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.promote_types(self.gain.dtype, torch.float32)

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        g, (b, t, _) = self.geometry, hidden.shape
        q, k, v = (
            p(hidden).view(b, t, -1, g.head_dim).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        k = self.bound * k.tanh() / g.head_dim
        group = g.num_heads // g.num_kv_heads
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        decay = self.decay[None, :, None].expand(b, -1, t)
        out, s = scan(q, k, v * self.gain[:, None, None], decay, state=state and state[0], mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), (s,)
