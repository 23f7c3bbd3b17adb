"""Gated DeltaNet: a state that is corrected by what it already says of a key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import SpecError
from .decay import Decay
from .gated_norm import GatedNorm
from .geometry import Geometry, whole
from .scan_mixer import Local, Recurrence, ScanMixer
from .short_convolution import ShortConvolution
from .tokens import Tokens


class GatedDelta(ScanMixer):
    """A = exp(g_t) S_(t-1), S_t = A + β_t k_t (v_t - A^T k_t)^T (2412.06464),
    out = O (RMSNorm(S_t^T q_t / sqrt(d)) ⊙ SiLU(G x)).

    q, k and v are projections behind a convolution of width ``conv`` and SiLU; then q and k are normalised to
    length 1. β = sigmoid(W_β x), g = -exp(A_log) softplus(W_g x + dt_bias), with exp(A_log) uniform in [0,
    16] and softplus(dt_bias) log-uniform in [0.001, 0.1] at first; a norm of each head; no RoPE. β, g and the
    state are of a KV head, as keys and values are, and are shared by its query heads.

    expand_v: numbers of a value per head_dim (the paper: 2). From attention the convolution begins without
    effect, gates at 1, and outputs small.

    Raises SpecError for an expand_v that leaves no whole number and for a conv below 1.
    """

    name: ClassVar[str] = "gated_delta"
    title: ClassVar[str] = "Gated DeltaNet"
    paper: ClassVar[str] = "2412.06464"
    from_geometry: ClassVar[bool] = True
    rotates = False

    def __init__(self, geometry: Geometry, *, expand_v: float = 1.0, conv: int = 4) -> None:
        size = whole(geometry.head_dim * expand_v)
        if size is None or size < 1 or conv < 1:
            raise SpecError(
                "gated_delta takes conv >= 1 and an expand_v whose product with head_dim "
                f"{geometry.head_dim} is a whole number of at least 1; got conv={conv}, expand_v={expand_v}."
            )
        super().__init__(geometry, value_dim=size)
        heads = geometry.num_kv_heads
        channels = sum(p.out_features for p in (self.q_proj, self.k_proj, self.v_proj))
        self.conv = ShortConvolution(channels, conv, bias=False)
        self.halo = conv - 1
        self.beta_proj = nn.Linear(self.hidden_size, heads, bias=False)
        self.decay = Decay(self.hidden_size, heads, lowest=0)
        self.norm = GatedNorm(self.hidden_size, geometry.num_heads, self.value_dim, eps=geometry.eps)

    @property
    def local_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The last inputs of the convolution."""
        return (self.conv.state_shape,)

    def inputs(self, tokens: Tokens, local: Local) -> tuple[Recurrence, Local, Local]:
        parts = self.project(tokens.hidden, None)
        (q, k, v), after = self.conv.of_heads(parts, local[0], tokens.count)
        # in float32, as float16 rounds the least norm of ``normalize`` to 0: padding would have NaN gradients
        q, k = (normalize(x.to(self.state_dtype), dim=3).to(x.dtype) for x in (q, k))
        beta = self.beta_proj(tokens.hidden).to(self.state_dtype).sigmoid().transpose(1, 2)
        g = self.decay(tokens.hidden, self.state_dtype)[1]
        return Recurrence(q, k, v, g, beta, self.key_dim**-0.5), (after,), ()

    def outputs(self, out: Tensor, tokens: Tokens, kept: Local) -> Tensor:
        return self.o_proj(self.norm(out, tokens.hidden))

    def initialise_from(self, weights: Mapping[str, Tensor]) -> None:
        super().initialise_from(weights)
        self.conv.pass_through()
        self.norm.begin_as_norm(self.first_sizes())
