"""What a mixer shares with the attention that it replaces: projections under their names, and RoPE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .geometry import Geometry
from .mixer import Mixer, Rotary


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """RoPE of x [B, T, heads, D] by cos and sin [B or 1, T, R]: the first R of the D numbers are rotated,
    number i with number i + R / 2, as in Llama. Without ``rotary`` x is returned as it is."""
    if rotary is None:
        return x
    cos, sin = (angle[:, :, None].to(x.dtype) for angle in rotary)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class Projected(Mixer):
    """A mixer with the projections of the attention that it replaces, and the norms of its queries and keys:
    ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``q_norm`` and ``k_norm``."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        g = self.geometry = geometry
        self.hidden_size = g.hidden_size
        self.q_proj = nn.Linear(g.hidden_size, g.num_heads * g.head_dim, g.bias)
        self.k_proj = nn.Linear(g.hidden_size, g.num_kv_heads * g.head_dim, g.bias)
        self.v_proj = nn.Linear(g.hidden_size, g.num_kv_heads * g.head_dim, g.bias)
        self.o_proj = nn.Linear(g.num_heads * g.head_dim, g.hidden_size, g.out_bias)
        if g.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(g.head_dim, g.eps) for _ in range(2))

    def project(self, hidden: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, hidden] -> q [B, T, H, D] and k, v [B, T, Hkv, D]; q and k after norms and RoPE."""
        q, k, v = (
            p(hidden).unflatten(2, (-1, self.geometry.head_dim))
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.geometry.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotary), rotate(k, rotary), v

    @property
    def key_shape(self) -> tuple[int, int]:
        """The shape of one token's keys, and of its values: [Hkv, D]."""
        return self.geometry.num_kv_heads, self.geometry.head_dim
