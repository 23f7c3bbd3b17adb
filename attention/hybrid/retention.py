"""Retention: linear attention with a fixed decay of each head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import SpecError
from .gated_norm import GatedNorm
from .geometry import Geometry
from .scan_mixer import Local, Recurrence, ScanMixer
from .tokens import Tokens


class Retention(ScanMixer):
    """S_t = γ S_(t-1) + k_t v_t^T, out = O (RMSNorm(S_t^T q_t / sqrt(d)) ⊙ SiLU(G x)) (2307.08621).

    γ = 1 - 2^(-5-h) of query head h; q and k behind RoPE; a norm of each head; no normaliser of the sum. Keys
    and values of a KV head are shared by its query heads, states are not, because the decays differ.
    expand_v: numbers of a value per head_dim (the paper: 2). From attention it begins without gates, and with
    small outputs.

    Raises SpecError for an expand_v that leaves no whole number.
    """

    name: ClassVar[str] = "retention"
    title: ClassVar[str] = "Retention"
    paper: ClassVar[str] = "2307.08621"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, expand_v: float = 1.0) -> None:
        size = geometry.head_dim * expand_v
        if size < 1 or size != int(size):
            raise SpecError(
                f"retention takes an expand_v whose product with head_dim {geometry.head_dim} is a whole "
                f"number of at least 1; got expand_v={expand_v}."
            )
        super().__init__(geometry, value_dim=int(size))
        self.log_decay = [math.log1p(-(2.0 ** (-5 - head))) for head in range(geometry.num_heads)]
        self.norm = GatedNorm(self.hidden_size, geometry.num_heads, self.value_dim, eps=geometry.eps)

    @property
    def scan_shape(self) -> tuple[int, int, int]:
        return self.geometry.num_heads, self.key_dim, self.value_dim

    def inputs(self, tokens: Tokens, local: Local) -> tuple[Recurrence, Local, Local]:
        q, k, v = (x.transpose(1, 2) for x in self.project(tokens.hidden, tokens.rotary))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        g = torch.tensor(self.log_decay, dtype=self.state_dtype, device=q.device)
        return Recurrence(q, k, v, g[:, None].expand(q.shape[:3]), scale=self.key_dim**-0.5), (), ()

    def outputs(self, out: Tensor, tokens: Tokens, kept: Local) -> Tensor:
        return self.o_proj(self.norm(out, tokens.hidden))

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        super().initialise_from(weights)
        self.norm.begin_as_norm(self.first_sizes())
