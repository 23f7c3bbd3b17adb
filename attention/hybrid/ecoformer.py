"""EcoFormer: linear attention whose queries and keys are binary codes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import SpecError
from .geometry import Geometry
from .scan_mixer import Local, Recurrence, ScanMixer
from .straight_through import straight_through
from .tokens import Tokens


class EcoFormer(ScanMixer):
    """out_t = W_o (sum_(j <= t) s_tj v_j) / (sum_(j <= t) s_tj), where s_tj is the share of equal bits in
    the codes of q_t and k_j (EcoFormer, 2209.09004).

    Bit b of x is the sign of sum_a exp(-|x - z_a|^2 / D) W_ab + c_b, a kernelised hash with ``anchors``
    anchors z of each KV head. s = (1 + h(q) . h(k) / bits) / 2 is a product of features, so that the state
    is a sum of bits + 1 values, and their number. The paper fits the hash to the attention of a model and
    takes anchors from the data; here all of it is trained, and the gradient of the sign is that of tanh. A
    query none of whose bits is in a key has the output 0. The products are not made of additions alone,
    which the paper counts as energy.

    Raises SpecError for bits or anchors below 1.
    """

    name: ClassVar[str] = "ecoformer"
    title: ClassVar[str] = "EcoFormer"
    paper: ClassVar[str] = "2209.09004"
    from_geometry: ClassVar[bool] = True
    ordered: ClassVar[bool] = False
    discrete: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, *, bits: int = 16, anchors: int = 20) -> None:
        if min(bits, anchors) < 1:
            raise SpecError(f"ecoformer takes bits and anchors of at least 1; got {bits=}, {anchors=}.")
        super().__init__(geometry)
        heads = geometry.num_kv_heads
        self.bits = bits
        self.anchors = nn.Parameter(torch.randn(heads, anchors, geometry.head_dim))
        self.hash = nn.Parameter(torch.randn(heads, anchors, bits) / anchors**0.5)
        self.offset = nn.Parameter(torch.zeros(heads, 1, bits))

    @property
    def scan_shape(self) -> tuple[int, int, int]:
        return self.geometry.num_kv_heads, self.bits + 1, self.value_dim + 1

    def inputs(self, tokens: Tokens, local: Local) -> tuple[Recurrence, Local, Local]:
        q, k, v = (x.transpose(1, 2) for x in self.project(tokens.hidden, tokens.rotary))
        v = torch.cat([v, torch.ones_like(v[..., :1])], 3)
        return Recurrence(self.codes(q), self.codes(k), v, None, scale=0.5), (), ()

    def outputs(self, out: Tensor, tokens: Tokens, kept: Local) -> Tensor:
        y = out[..., :-1] / out[..., -1:].clamp(min=0.5 / self.bits)  # the least share is 1 / bits
        return self.o_proj(y.transpose(1, 2).flatten(2).to(tokens.hidden.dtype))

    def codes(self, x: Tensor) -> Tensor:
        """x [B, heads, T, D] -> [h(x) / sqrt(bits), 1], [B, heads, T, bits + 1]; h(x) are 1 and -1."""
        wide = self.state_dtype
        anchors, weights, offset = (
            p.to(wide).repeat_interleave(x.shape[1] // len(p), 0)
            for p in (self.anchors, self.hash, self.offset)
        )
        distance = (x.to(wide)[..., None, :] - anchors[:, None]).square().mean(-1)
        y = (-distance).exp() @ weights + offset
        code = straight_through(torch.where(y < 0, -1.0, 1.0).to(wide), y.tanh()) / self.bits**0.5
        return torch.cat([code, torch.ones_like(code[..., :1])], 3)
