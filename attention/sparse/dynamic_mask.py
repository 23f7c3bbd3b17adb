"""Dynamic Mask Attention: the keys with the largest bias, which a gate computes from their values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..budget import select_topk
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..running import kept_until
from ..selection import Biased, EveryKey, Index, Selection, Spans, TokenIndex
from ..summary import Summary
from .value_bias import BiasLabels, ValueBias


@dataclass(frozen=True, kw_only=True)
class DynamicMask(AttentionMethod):
    """Every query reads the w keys before it with the largest bias, and the bias is added to their logits
    (Dynamic Mask Attention, 2508.02124).

    The bias of a key and KV head is A . softplus(V W), of the values of all KV heads (``ValueBias``);
    form="exp" takes exp(A . softplus(V W)), as the paper and its first code do. It does not depend on the
    query. Of equal biases the later key is larger, so untrained weights (A = 0) give a window of w keys. The
    biases are kept as labels of the keys, one float32 number each. Every decode step chooses anew from the
    biases of all keys: it reads 4 bytes of each, drops no key and frees no memory.

    ``add_bias``, as in the paper, adds the bias to the logits of the kept keys. Up to w keys nothing is left
    out and the bias is still added: with a budget that covers every key the method is dense attention plus
    bias then, and dense attention only where all biases of a head are equal. Gradients flow through the bias
    in prefill, where the gate or the values want them (a gate from a recipe is frozen: ``requires_grad_()``);
    the choice has none.

    ``farspan train`` teaches the bias where the frozen model's attention goes (``ValueBias.loss``). Such a
    bias is made to choose. Added, it changes the attention of a model that was not fine-tuned with it, so it
    is not added by default. Departures: causal selection, where the first kernels chose one set of keys for
    all queries; the last ``local`` of the w keys are always read (0 in the paper), since values do not tell
    which keys are recent.
    """

    name: ClassVar[str] = "dynamic_mask"
    title: ClassVar[str] = "Dynamic Mask Attention"
    paper: ClassVar[str] = "2508.02124"
    trained_with: ClassVar[tuple[str, ...]] = ("form",)

    w: int = 2048
    local: int = 64
    form: str = "softplus"
    add_bias: bool = False
    recipe: str = ""
    gate: ValueBias | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, w=(1, None), local=(0, None), form=("softplus", "exp"))
        if self.local >= self.w:
            raise SpecError(
                f"dynamic_mask chooses w - local keys by their bias, so local must be below w; got "
                f"w={self.w}, local={self.local}."
            )

    @property
    def needs(self) -> Needs:
        weights = {"a": ("num_kv_heads",), "w": ("num_kv_heads", "head_dim", "num_kv_heads")}
        return Needs(weights=weights)

    @property
    def couples_heads(self) -> bool:
        return True  # a bias is made of the values of all KV heads

    @property
    def module(self) -> nn.Module | None:
        return self.gate

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (BiasLabels(self.gate),)

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        weights = layer.checked(self)
        return replace(self, gate=ValueBias(weights["a"], weights["w"], self.form).requires_grad_(False))

    def for_training(self, layer: LayerInfo) -> AttentionMethod | None:
        return replace(self, gate=ValueBias.new(layer.num_kv_heads, layer.head_dim, self.form))

    def distillation_loss(self, q: Tensor, keys: Keys) -> Tensor:
        assert self.gate is not None
        return self.gate.loss(q, keys, self.local)

    def reads(self, queries: Queries) -> Cost:
        if queries.length <= self.w and not self.add_bias:
            return queries.cost()
        labels = queries.entries(*self.summaries)
        return queries.cost(queries.seen.clamp(max=self.w), selection=labels, candidates=self.w)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if keys.length <= self.w and not self.add_bias:
            return None
        bias = keys.summary(*self.summaries)[..., 0]  # [B, Hkv, Tk]
        read: Selection = EveryKey()
        if keys.length > self.w:
            until = torch.maximum(kept_until(bias, self.w - self.local), keys.places())
            read = Spans(until=until + self.local)
        return self._answer(read, bias, keys)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        if self.w >= keys.longest() and not self.add_bias:
            return None
        bias = keys.summary(*self.summaries)[..., 0]  # [B, Hkv, N], N of the Tk keys held here
        if self.w >= keys.longest():
            return self._answer(EveryKey(), bias, keys)
        place = keys.places()
        queries = torch.arange(keys.past, keys.length, device=q.device)[:, None]
        ranked = _in_order(bias, place)[:, :, None].masked_fill(place > queries - self.local, torch.inf)
        visible = keys.visible()
        if visible is not None:
            ranked = ranked.masked_fill(~visible[:, None], -torch.inf)
        every = self.w <= keys.fewest()
        tokens, counts = select_topk(ranked, self.w, self.w, keys.peers, every=every)  # [B, Hkv, Tq, w]
        return self._answer(TokenIndex(tokens=tokens, counts=counts), bias, keys)

    def _answer(self, read: Selection, bias: Tensor, keys: Keys) -> Selection:
        """``read`` with the bias added, where it is."""
        if not self.add_bias:
            return read
        gate, v = self.gate, keys.kv.v
        if torch.is_grad_enabled() and gate is not None and (gate.a.requires_grad or v.requires_grad):
            bias = gate(v)  # labels have no gradient
        return Biased(read=read, bias=bias)


def _in_order(bias: Tensor, place: Tensor) -> Tensor:
    """Numbers in the order of bias [..., N] float32 and, where biases are equal, of place [N] (below 2^21),
    no two of them equal: [..., N] float64."""
    bits = (bias + 0.0).view(torch.int32)  # -0 becomes 0
    rising = (bits ^ (bits >> 31 & 0x7FFFFFFF)).double()
    return rising * 2**21 + place
