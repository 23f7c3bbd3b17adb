"""Sigmoid attention: every key is weighed by itself, without a normaliser over the keys."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..ops.autocast import without_autocast
from ..ops.kernel import fold_groups
from .geometry import Geometry
from .growing import places
from .kept_keys import KeepsKeys
from .mixer import Rotary, State

_ROWS = 256  # queries whose weights are in memory at a time


class Sigmoid(KeepsKeys):
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
    ordered: ClassVar[bool] = False

    def __init__(self, geometry: Geometry, *, length: int = 2048, norm: bool = False) -> None:
        super().__init__(geometry)
        if length < 1:
            raise SpecError(f"sigmoid takes a length of at least 1 token; got {length}.")
        self.bias = -math.log(length)
        self.norm = nn.RMSNorm(geometry.hidden_size, geometry.eps) if norm else None

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ()

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
        k, v = (x.transpose(1, 2) for x in (keys, values))  # [B, Hkv, n, D]
        outs = [
            self._attend(rows, k, v, position)
            for rows, position in zip(
                q.transpose(1, 2).split(_ROWS, 2), at.position.split(_ROWS, 1), strict=True
            )
        ]
        out = self.o_proj(torch.cat(outs, 2).transpose(1, 2).flatten(2).to(hidden.dtype))
        return out if self.norm is None else self.norm(out), (keys, values, at.end)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        """q [B, H, T, D] at position [B, T] over keys and values [B, Hkv, n, D]: the sum over the keys that
        every query reads, which needs no mask, and that over the others up to the last query."""
        first, last = (int(x) + 1 for x in position.aminmax())
        scale = self.geometry.softmax_scale
        out = sigmoid_sum(q, k[:, :, :first], v[:, :, :first], scale=scale, bias=self.bias)
        if first == last:
            return out
        keep = torch.arange(first, last, device=q.device) <= position[..., None]
        k, v = k[:, :, first:last], v[:, :, first:last]
        return out + sigmoid_sum(q, k, v, keep, scale=scale, bias=self.bias)


@without_autocast
def sigmoid_sum(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, *, scale: float, bias: float
) -> Tensor:
    """Sums of values weighed by sigmoids: q [B, H, T, D], k, v [B, Hkv, n, D] -> [B, H, T, D] in float32, or
    float64 for float64 inputs. keep: [B, T, n] bool, False where a query does not read a key; None where each
    reads all."""
    wide, (b, h, t, d), hkv = torch.promote_types(q.dtype, torch.float32), q.shape, k.shape[1]
    rows, keys, values = (x.to(wide) for x in (fold_groups(q, hkv), k, v))
    rows, keys, values = (x.flatten(0, 1) for x in (rows, keys, values))  # [B * Hkv, G * T or n, D]
    logits = torch.baddbmm(rows.new_full((1, 1, 1), bias), rows, keys.mT, alpha=scale)
    if keep is not None:
        hidden = ~keep[:, None, None].expand(b, hkv, h // hkv, t, -1).reshape(logits.shape)
        logits = logits.masked_fill(hidden, -torch.inf)
    return torch.bmm(logits.sigmoid(), values).view(b, h, t, d)
