"""What a mixer is made for: the geometry of the attention that it replaces."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import SpecError


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """hidden_size: numbers of a hidden state. head_dim: numbers of a query, a key or a value. bias: whether
    the projections of queries, keys and values have one; out_bias: whether that of the output has one.
    qk_norm: whether queries and keys pass an RMSNorm over ``head_dim`` before RoPE, with weights q_norm and
    k_norm. scale: of the attention's scores; None: 1 / sqrt(head_dim). eps: of norms.

    Raises SpecError for sizes below 1 and for query heads that do not divide among the KV heads.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        if min(sizes) < 1 or self.num_heads % self.num_kv_heads:
            raise SpecError(
                "A mixer needs sizes of at least 1 and a whole number of query heads per KV head; got "
                f"hidden_size, num_heads, num_kv_heads, head_dim = {sizes}."
            )

    @property
    def softmax_scale(self) -> float:
        """The factor of the attention's scores."""
        return self.head_dim**-0.5 if self.scale is None else self.scale


def whole(number: float) -> int | None:
    """The number as an integer; None where it is not whole, not finite, or no number."""
    return int(number) if math.isfinite(number) and number == int(number) else None
