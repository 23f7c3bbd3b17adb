"""Sigmoid attention: every key is weighed by itself, without a normaliser over the keys."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from .geometry import Geometry
from .growing import Growing, places
from .mixer import Rotary, State
from .projections import Projected

_ROWS = 256  # queries whose weights are in memory at a time


class Sigmoid(Projected):
    """out_t = W_o sum_{j <= t} sigmoid(scale * q_t . k_j + b) v_j with b = -ln(length) (arXiv 2409.04431).

    A key's weight does not depend on the other keys, so sums over disjoint sets of keys are added as they
    are: there is no log-sum-exp. Hidden keys have the logit -inf before the sigmoid. The bias keeps the sum
    of the first weights near 1; it belongs to the length that the model is trained at and does not follow
    that of a prompt. Attention weights trained with a softmax are a start and no more: the mixer must be
    trained.

    The state is the keys and values of all tokens [B, n, Hkv, D] in the dtype of the weights: as large as the
    KV cache of the attention replaced, so that this mixer saves no memory. A step copies it once.

    length: the N of the bias, tokens. norm: whether an RMSNorm follows the output projection. The paper needs
    a norm of the attention's output in large or long models; where exactly it stands and of which kind it is
    we have not verified.

    Raises SpecError for a length below 1.
    """

    name: ClassVar[str] = "sigmoid"
    title: ClassVar[str] = "Sigmoid attention"
    paper: ClassVar[str] = "2409.04431"
    from_geometry: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, length: int = 2048, norm: bool = False) -> None:
        super().__init__(geometry)
        if length < 1:
            raise SpecError(f"sigmoid takes a length of at least 1 token; got {length}.")
        self.bias = -math.log(length)
        self.norm = nn.RMSNorm(geometry.hidden_size, geometry.eps) if norm else None

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ()

    @property
    def growing(self) -> tuple[Growing, ...]:
        return (Growing(shape=self.key_shape, dtype=self.k_proj.weight.dtype),) * 2

    def forward(
        self,
        hidden: Tensor,
        state: State | None = None,
        mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> tuple[Tensor, State]:
        keys, values, tokens = state or self.initial_state(len(hidden), hidden.device)
        at = places(tokens, mask, hidden.shape[1])
        q, k, v = self.project(hidden, rotary)
        part, _ = self.growing
        keys, values = part.append(keys, k, at), part.append(values, v, at)
        entry = torch.arange(keys.shape[1], device=keys.device)
        scale = self.geometry.softmax_scale
        outs = [
            sigmoid_sum(rows, keys, values, entry <= position[..., None], scale=scale, bias=self.bias)
            for rows, position in zip(q.split(_ROWS, 1), at.position.split(_ROWS, 1), strict=True)
        ]
        out = self.o_proj(torch.cat(outs, 1).flatten(2).to(hidden.dtype))
        return out if self.norm is None else self.norm(out), (keys, values, at.end)


def sigmoid_sum(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, scale: float, bias: float) -> Tensor:
    """Sums of values weighed by sigmoids: q [B, T, H, D], k, v [B, n, Hkv, D], keep [B, T, n] bool -> [B, T,
    H, D] in float32, or float64 for float64 inputs. Query heads h // (H / Hkv) share a KV head."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).unflatten(2, (k.shape[2], -1))  # [B, T, Hkv, G, D]
    logits = torch.einsum("bthgd,bnhd->bhgtn", rows, k.to(wide)) * scale + bias
    weights = logits.masked_fill(~keep[:, None, None], -torch.inf).sigmoid()
    return torch.einsum("bhgtn,bnhd->bthgd", weights, v.to(wide)).flatten(2, 3)
