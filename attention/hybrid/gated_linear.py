"""Gated linear attention, with an exact window inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ..errors import SpecError
from .feature_map import FeatureMap, Softmax
from .gated_norm import GatedNorm
from .geometry import Geometry, whole
from .scan_mixer import Local, Recurrence, ScanMixer
from .tokens import Tokens, follow
from .window import window_attention

_REMEMBER = 6.0  # the bias of a gate at first: it decays by a factor of e in 6,500 tokens


class GatedLinear(ScanMixer):
    """window = w: softmax attention over the last w keys and linear attention over all earlier ones, with one
    normaliser, as in LoLCATs (2410.10254):

        out_i = (a_i + c φ(q_i)^T S_i) / (1 + c φ(q_i)^T z_i)
        S_i = exp(g_i) S_(i-1) + φ(k_(i-w)) v_(i-w)^T,  z_i = exp(g_i) z_(i-1) + φ(k_(i-w))

    with a_i the attention over the window, q and k behind RoPE, and a learned c of each head, 1 at first.
    LoLCATs has sum_j exp(s_ij - max_j s_ij) v_j over the window in place of a_i, and the sum without v_j in
    place of 1; fitted to three layers of SmolLM2, that left 1.4 to 1.8 times the squared error. Its window
    begins anew at every w tokens and it has no decay; here the window slides, and g = logsigmoid(W x + b) /
    16 of each KV head begins with hardly any decay. features: "learned" for φ with weights, about head_dim
    numbers, or "plain" for φ = softmax. S and z are of a KV head, as keys and values are. Up to w tokens a
    converted layer is the attention that it replaces, but for a soft-cap of its scores.

    window = 0: gated linear attention as published (2312.06635), S_i = diag(exp(g_i)) S_(i-1) + k_i v_i^T,
    out = RMSNorm(q^T S / sqrt(d)) ⊙ SiLU(G x), where g = logsigmoid(W_2 W_1 x + b) / 16 of each channel is
    of rank 16; no RoPE, no φ. expand_k: numbers of a key per head_dim (the paper: 0.5). From attention it
    begins without gates, and with small outputs.

    Raises SpecError for a window below 0, other features, and an expand_k that leaves no whole number.
    """

    name: ClassVar[str] = "gated_linear"
    title: ClassVar[str] = "Gated linear attention"
    paper: ClassVar[str] = "2312.06635"
    from_geometry: ClassVar[bool] = True

    def __init__(
        self, geometry: Geometry, *, window: int = 64, features: str = "learned", expand_k: float = 1.0
    ) -> None:
        size = whole(geometry.head_dim * expand_k)
        if window < 0 or features not in ("learned", "plain") or size is None or size < 1:
            raise SpecError(
                f"gated_linear takes window >= 0, features learned or plain, and an expand_k whose product "
                f"with head_dim {geometry.head_dim} is a whole number; got "
                f"gated_linear:window={window},features={features},expand_k={expand_k}."
            )
        if not window and features != "learned":
            raise SpecError(
                f"gated_linear takes features with a window alone; got {features!r} and window=0."
            )
        super().__init__(geometry, key_dim=size, value_dim=geometry.head_dim)
        self.window = self.halo = window
        self.rotates = window > 0
        if not window:
            rank = nn.Linear(self.hidden_size, 16, bias=False)
            channels = nn.Linear(16, geometry.num_kv_heads * self.key_dim)
            self.gate_proj: nn.Module = nn.Sequential(rank, channels)
            self.norm = GatedNorm(self.hidden_size, geometry.num_heads, self.value_dim, eps=geometry.eps)
            return
        self.gate_proj = nn.Linear(self.hidden_size, geometry.num_kv_heads)
        nn.init.zeros_(self.gate_proj.weight), nn.init.constant_(self.gate_proj.bias, _REMEMBER)
        self.log_share = nn.Parameter(torch.zeros(geometry.num_heads))
        half = max(1, self.key_dim // 2)
        self.q_features, self.k_features = (
            FeatureMap(heads, self.key_dim, half) if features == "learned" else Softmax()
            for heads in (geometry.num_heads, geometry.num_kv_heads)
        )
        self.feature_dim = 2 * half if features == "learned" else self.key_dim

    @property
    def scan_shape(self) -> tuple[int, int, int]:
        if not self.window:
            return super().scan_shape
        return self.geometry.num_kv_heads, self.feature_dim, self.value_dim + 1

    @property
    def local_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Keys behind RoPE and values of the last tokens, and how many of them there are."""
        kept = (self.window, self.geometry.num_kv_heads)
        return ((*kept, self.key_dim), (*kept, self.value_dim), (1,)) if self.window else ()

    def inputs(self, tokens: Tokens, local: Local) -> tuple[Recurrence, Local, Local]:
        q, k, v = self.project(tokens.hidden, tokens.rotary if self.window else None)
        g = logsigmoid(self.gate_proj(tokens.hidden).to(self.state_dtype)) / 16
        t, n = q.shape[1], self.window
        if not n:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            g = g.unflatten(2, (self.geometry.num_kv_heads, -1)).transpose(1, 2)
            return Recurrence(q, k, v, g, scale=self.key_dim**-0.5), (), ()
        keys, keys_after = follow(local[0], k, tokens.count)
        values, values_after = follow(local[1], v, tokens.count)
        seen = local[2][:, 0]
        seen_after = (seen + (t if tokens.count is None else tokens.count)).clamp(max=n)
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        exact = window_attention(q, keys, values, scale=self.geometry.softmax_scale, valid=seen).out
        left = torch.arange(t, device=q.device) >= n - seen[:, None]  # whether a token leaves the window here
        features = self.k_features(keys[:, :, :t]) * left[:, None, :, None]
        leaving = torch.cat([values[:, :, :t], torch.ones_like(values[:, :, :t, :1])], 3)
        after = keys_after, values_after, seen_after[:, None]
        return Recurrence(self.q_features(q), features, leaving, g.transpose(1, 2)), after, (exact,)

    def outputs(self, out: Tensor, tokens: Tokens, kept: Local) -> Tensor:
        if not self.window:
            return self.o_proj(self.norm(out, tokens.hidden))
        (exact,) = kept
        share = self.log_share.to(exact.dtype).exp()[:, None, None]
        y = (exact + share * out[..., :-1]) / (1 + share * out[..., -1:])
        return self.o_proj(y.transpose(1, 2).flatten(2).to(tokens.hidden.dtype))

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        super().initialise_from(weights)
        if not self.window:
            self.norm.begin_as_norm(self.first_sizes())
            nn.init.constant_(self.get_parameter("gate_proj.1.bias"), _REMEMBER)
