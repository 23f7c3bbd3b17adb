"""What a mixer shares with the attention that it replaces: projections under their names, and RoPE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import SpecError
from .geometry import Geometry
from .mixer import Mixer, Rotary


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """RoPE of x [B, T, heads, D] by cos and sin [B or 1, T, R]: the first R of the D numbers are rotated,
    number i with number i + R / 2, as in Llama. Without ``rotary`` x is returned as it is.

    Raises SpecError for R above D.
    """
    if rotary is None:
        return x
    if rotary[0].shape[-1] > x.shape[-1]:
        raise SpecError(
            f"RoPE over {rotary[0].shape[-1]} numbers does not fit the mixer's heads of {x.shape[-1]}: make "
            "the mixer with the head_dim of the attention."
        )
    cos, sin = (angle[:, :, None].to(x.dtype) for angle in rotary)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)


class Projected(Mixer):
    """A mixer with the projections of the attention that it replaces, and the norms of its queries and keys:
    ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, ``q_norm`` and ``k_norm``.

    key_dim: numbers of a query or a key, value_dim: of a value; both are ``head_dim`` by default. Projections
    of another size begin anew in a conversion. rotates: whether queries and keys get RoPE.
    """

    rotates: bool = True

    def __init__(
        self, geometry: Geometry, *, key_dim: int | None = None, value_dim: int | None = None
    ) -> None:
        super().__init__()
        g = self.geometry = geometry
        self.hidden_size = g.hidden_size
        self.key_dim = g.head_dim if key_dim is None else key_dim
        self.value_dim = g.head_dim if value_dim is None else value_dim
        self.q_proj = nn.Linear(g.hidden_size, g.num_heads * self.key_dim, g.bias)
        self.k_proj = nn.Linear(g.hidden_size, g.num_kv_heads * self.key_dim, g.bias)
        self.v_proj = nn.Linear(g.hidden_size, g.num_kv_heads * self.value_dim, g.bias)
        self.o_proj = nn.Linear(g.num_heads * self.value_dim, g.hidden_size, g.out_bias)
        if g.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(self.key_dim, g.eps) for _ in range(2))

    def project(
        self, hidden: Tensor, rotary: Rotary | None, of_keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [B, T, hidden] -> q [B, T, H, Dk], k [B, T, Hkv, Dk] and v [B, T, Hkv, Dv]; q and k after
        norms and RoPE. of_keys: what keys are projected from, where it is not ``hidden``."""
        q, k, v = (
            p(x).unflatten(2, (-1, size))
            for p, x, size in (
                (self.q_proj, hidden, self.key_dim),
                (self.k_proj, hidden if of_keys is None else of_keys, self.key_dim),
                (self.v_proj, hidden, self.value_dim),
            )
        )
        if self.geometry.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotary), rotate(k, rotary), v

    @property
    def key_shape(self) -> tuple[int, int]:
        """The shape of one token's keys, and of its values: [Hkv, D]."""
        return self.geometry.num_kv_heads, self.geometry.head_dim
