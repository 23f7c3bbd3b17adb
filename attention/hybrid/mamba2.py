"""Mamba-2: a state space with one decay per head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from .decay import Decay
from .gated_norm import GatedNorm
from .geometry import Geometry, whole
from .scan_mixer import Local, Recurrence, ScanMixer
from .short_convolution import ShortConvolution
from .tokens import Tokens

_PUBLISHED = 64, 128  # headdim and state


class Mamba2(ScanMixer):
    """S_t = exp(-Δ_t A) S_(t-1) + Δ_t B_t x_t^T,  y_t = S_t^T C_t + D x_t of each head (2405.21060);
    out = O RMSNorm(y ⊙ SiLU(z)).

    x, B and C are projections of the hidden states behind a convolution of width ``conv`` and SiLU; z and Δ
    are projections, Δ = softplus(. + dt_bias). A, dt_bias and D, numbers of each head, begin as published: A
    in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1], D = 1. No RoPE.

    In the place of attention (the default) it has the form of MambaInLlama (2408.15237): x is v_proj, B
    k_proj, C q_proj and O o_proj. There are as many heads as query heads, each with its own C and with the B
    and x of its KV head, states of head_dim x head_dim, and a norm of each head. From attention the
    convolution begins without effect, gates at 1, and outputs small; the rest is new.

    expand > 0: the published form instead, expand * hidden_size numbers of x in heads of ``headdim``, and one
    B and C of ``state`` numbers for all heads. The heads of the attention do not matter, and none of its
    weights is used.

    Raises SpecError for sizes below 1, heads that do not divide expand * hidden_size, and headdim or state
    without expand.
    """

    name: ClassVar[str] = "mamba2"
    title: ClassVar[str] = "Mamba-2"
    paper: ClassVar[str] = "2405.21060"
    from_geometry: ClassVar[bool] = True
    rotates = False

    def __init__(
        self,
        geometry: Geometry,
        *,
        expand: float = 0.0,
        headdim: int = _PUBLISHED[0],
        state: int = _PUBLISHED[1],
        conv: int = 4,
    ) -> None:
        inner = whole(geometry.hidden_size * expand)
        if inner is None or inner < 0 or min(headdim, state, conv) < 1 or inner % headdim:
            raise SpecError(
                f"mamba2 takes headdim, state and conv of at least 1, and an expand whose product with "
                f"hidden_size {geometry.hidden_size} is 0 or a multiple of headdim; got expand={expand}, "
                f"headdim={headdim}, state={state}, conv={conv}."
            )
        if inner == 0 and (headdim, state) != _PUBLISHED:
            raise SpecError(
                f"mamba2 takes headdim and state with expand alone, because without it both are the "
                f"attention's head_dim; got headdim={headdim}, state={state}: add expand=2."
            )
        if inner:  # one head of queries and keys, and all of x as its values
            geometry = Geometry(
                hidden_size=geometry.hidden_size,
                num_heads=1,
                num_kv_heads=1,
                head_dim=state,
                eps=geometry.eps,
            )
        super().__init__(geometry, value_dim=inner or None)
        self.published = inner > 0
        self.size = headdim if inner else geometry.head_dim  # of a head of x
        self.heads = self.o_proj.in_features // self.size
        channels = sum(p.out_features for p in (self.v_proj, self.k_proj, self.q_proj))
        self.conv = ShortConvolution(channels, conv, bias=True)
        self.decay = Decay(self.hidden_size, self.heads, lowest=1)
        self.D = nn.Parameter(torch.ones(self.heads))
        groups = 1 if inner else self.heads
        self.norm = GatedNorm(
            self.hidden_size, self.heads, self.size, eps=geometry.eps, groups=groups, gate_first=True
        )
        self.halo = conv - 1

    @property
    def scan_shape(self) -> tuple[int, int, int]:
        return self.heads, self.key_dim, self.size

    @property
    def local_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The last inputs of the convolution."""
        return (self.conv.state_shape,)

    def inputs(self, tokens: Tokens, local: Local) -> tuple[Recurrence, Local, Local]:
        c, b, x = self.project(tokens.hidden, None)
        x = x.flatten(2).unflatten(2, (-1, self.size))  # the published form projects to one head
        (x, b, c), after = self.conv.of_heads((x, b, c), local[0], tokens.count)
        x = x.repeat_interleave(self.heads // x.shape[1], 1)
        b = b.repeat_interleave(c.shape[1] // b.shape[1], 1)
        delta, g = self.decay(tokens.hidden, self.state_dtype)
        return Recurrence(c, b, (x * delta[..., None]).to(x.dtype), g), (after,), (x,)

    def outputs(self, out: Tensor, tokens: Tokens, kept: Local) -> Tensor:
        y = out + self.D.to(out.dtype)[:, None, None] * kept[0]
        return self.o_proj(self.norm(y, tokens.hidden))

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        if not self.published:
            super().initialise_from(weights)
            self.conv.pass_through()
            self.norm.begin_as_norm(self.first_sizes())
