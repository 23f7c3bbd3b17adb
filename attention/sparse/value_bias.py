"""The bias of Dynamic Mask Attention (2508.02124): a number per key and KV head, made of the values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from ..keys import Keys
from ..received import attention_of_last
from ..sources import Source, Sources
from ..summary import identity


class ValueBias(nn.Module):
    """A . softplus(V W) of one layer, or the exponential of that (form="exp").

    w [Hkv, D, Hkv] maps the values of all KV heads to a number of each KV head. a [Hkv] begins at 0: all
    biases are then equal, and the attention of the model is as it was. There is no bias term, as in models
    whose projections have none.
    """

    def __init__(self, a: Tensor, w: Tensor, form: str) -> None:
        super().__init__()
        self.a, self.w, self.form = nn.Parameter(a), nn.Parameter(w), form

    @staticmethod
    def new(num_kv_heads: int, head_dim: int, form: str) -> ValueBias:
        """As training begins: a = 0, w random."""
        w = torch.randn(num_kv_heads, head_dim, num_kv_heads) * (num_kv_heads * head_dim) ** -0.5
        return ValueBias(torch.zeros(num_kv_heads), w, form)

    def forward(self, v: Tensor) -> Tensor:
        """Values [B, Hkv, T, D] -> biases [B, Hkv, T] in float32, or float64 for float64 values."""
        wide = torch.promote_types(v.dtype, torch.float32)
        bias = self.a.to(wide) * softplus(torch.einsum("bhtd,hdk->btk", v.to(wide), self.w.to(wide)))
        return (bias.exp() if self.form == "exp" else bias).transpose(1, 2)

    def loss(self, q: Tensor, keys: Keys, local: int) -> Tensor:
        """The KL divergence of softmax(bias) from the model's attention, both over the keys before the last
        ``local`` of each query t, weighted with the attention m_t that lies there. A scalar.

            sum_t m_t KL(p_t / m_t || softmax(bias[.. t - local])) / sum_t m_t

        p_t is the mean attention of the query heads of a group. This loss is ours: the paper trains with the
        language model. The bias knows no query, so a key's bias learns how much attention all later queries
        pay to it, which is what decides whether to keep it. q [B, H, T, D]: all queries of the window. The
        attention is computed in tiles of queries; nothing of size T x T is made.
        """
        bias = self(keys.kv.v)
        length = keys.length
        received, mass = torch.zeros_like(bias), torch.zeros_like(bias)  # of a key, of a query
        entropy = bias.new_zeros(())
        with torch.no_grad():
            for first, tile in attention_of_last(q, keys, length):
                share = tile.mean(2).to(bias.dtype)  # [B, Hkv, rows, M]
                rows = torch.arange(first, first + share.shape[2], device=q.device)
                share.masked_fill_(torch.arange(share.shape[3], device=q.device) > rows[:, None] - local, 0)
                there = share.sum(3)
                entropy += torch.xlogy(share, share).sum() - torch.xlogy(there, there).sum()
                received[..., : share.shape[3]] += share.sum(2)
                mass[..., first : first + share.shape[2]] = there
        # log sum exp of the biases that query t may read: the first t - local + 1.
        reach = pad(bias.logcumsumexp(-1), (local, 0))[..., :length]
        apart = entropy - (received * bias).sum() + (mass * reach).sum()
        return apart / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)


@dataclass(frozen=True)
class BiasLabels:
    """The bias of each key, a label of one float32 number. gate: None where only its size is asked for."""

    gate: ValueBias | None = field(default=None, compare=False, repr=False)
    block: ClassVar[None] = None
    dtype: ClassVar[torch.dtype] = torch.float32
    most: ClassVar[None] = None
    reads: ClassVar[frozenset[Source]] = frozenset({"values"})

    @property
    def key(self) -> tuple:
        return ("value_bias", None if self.gate is None else identity(self.gate))

    def width(self, head_dim: int) -> int:
        return 1

    @torch.no_grad()
    def compute(self, x: Sources) -> Tensor:
        assert self.gate is not None, "for_layer was not called"
        return self.gate(x.values).float()[..., None]
