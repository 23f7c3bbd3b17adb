"""Double Sparsity: token selection by a few calibrated channels of each key."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..budget import budget, budget_at, check_budget, max_budget, select_topk
from ..cost import Cost, Queries
from ..errors import FarspanError
from ..gqa import group_scores
from ..index import Index, TokenIndex
from ..keys import Keys
from ..method import AttentionMethod, LayerInfo, require
from ..ops.scores import scores
from ..softmax import Softmax
from ..summary import Channels, Summary

RANKINGS = ("q", "k", "qk")
LABELS = 32  # channels of a key, where no group_factor is given


@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(AttentionMethod):
    """Exact attention over the top-k keys by q_label . k_label on calibrated channels (Double Sparsity,
    2408.07092).

    Offline, ``farspan calibrate`` ranks each KV head's channels by mean |q|, |k| or |q k| on text the user
    names. At decode a label cache holds the first D / group_factor ranked channels of every key, per KV head,
    kept incrementally; without a group_factor the first 32, as in the paper's 32 of 128. Labels score all
    keys, and the best k are read exactly. Query heads of a group share one selection by the ``gqa_reduce``
    ("sum" or "max") of their estimated attention, or choose each for itself ("none"). Layers below
    ``dense_layers`` stay dense; prefill is dense.
    """

    name: ClassVar[str] = "double_sparsity"
    title: ClassVar[str] = "Double Sparsity"
    paper: ClassVar[str] = "2408.07092"
    needs_recipe: ClassVar[bool] = True

    k: int | None = 512
    fraction: float | None = None
    group_factor: int | None = None
    gqa_reduce: str = "sum"
    dense_layers: int = 2
    recipe: str = ""
    labels: Channels | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        check_budget(self, self.k, self.fraction)
        require(self, group_factor=(1, None), gqa_reduce=("sum", "max", "none"), dense_layers=(0, None))

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        if layer.index < self.dense_layers:
            return None
        if layer.weights is None or "channels" not in layer.weights:
            raise FarspanError(
                f"double_sparsity needs a recipe with calibrated channels for layer {layer.index}: make one "
                "with "
                "'farspan calibrate' and pass recipe=PATH."
            )
        ranking = layer.own(layer.weights["channels"])  # [Hkv, D], best first
        if tuple(ranking.shape) != (layer.num_kv_heads, layer.head_dim):
            raise FarspanError(
                f"This recipe ranks {list(ranking.shape)} channels in layer {layer.index}, the model has "
                f"[{layer.num_kv_heads}, {layer.head_dim}]: it was made for another model."
            )
        width = self._width(layer.head_dim)
        return replace(self, labels=Channels(ranking[:, :width].sort(-1).values.long()))

    def _width(self, head_dim: int) -> int:
        """Channels of a label."""
        return max(1, head_dim // self.group_factor) if self.group_factor else min(LABELS, head_dim)

    def calibration(self, layer: LayerInfo, *, by: str = "qk") -> ChannelRanking:
        """by: "q" or "k" ranks a channel by its mean magnitude before RoPE; "qk" by the mean of |q_c k_c|
        over pairs of query and key after RoPE, which is the product of the two mean magnitudes. Query heads
        of a group count together."""
        return ChannelRanking(layer, by)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return () if self.labels is None else (self.labels,)

    def reads(self, queries: Queries) -> Cost:
        size = budget_at(self.k, self.fraction, queries.length)
        if size >= queries.length:
            return queries.cost()
        labels = queries.raw_keys(queries.length * self._width(queries.head_dim) / queries.head_dim)
        return queries.cost(queries.seen.clamp(max=size), selection=labels, candidates=size)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        size = budget(self.k, self.fraction, keys)
        if isinstance(size, int) and size >= keys.longest():
            return None
        assert self.labels is not None, "for_layer was not called"
        labels = keys.summary(self.labels)  # [B, Hkv, N, r], N of the Tk keys held here
        b, h, tq, _ = q.shape
        channels = self.labels.on(q.device).repeat_interleave(h // keys.kv.num_kv_heads, 0)
        q_labels = q.gather(3, channels[None, :, None].expand(b, h, tq, -1))
        logits = scores(q_labels, labels, keys.softmax)
        ranked = group_scores(logits, keys.visible(), self.gqa_reduce, keys.peers)
        tokens, counts = select_topk(ranked, size, max_budget(self.k, self.fraction, keys), keys.peers)
        return TokenIndex(tokens=tokens, counts=counts)


class ChannelRanking:
    """``channels`` [Hkv, D] int32, each KV head's channels, best first, by running sums of |q| and |k|."""

    def __init__(self, layer: LayerInfo, by: str) -> None:
        if by not in RANKINGS:
            raise FarspanError(f"Channels are ranked by {', '.join(RANKINGS)}; got {by!r}.")
        self.before_rope, self.settings = by != "qk", {"by": by}
        self._by, self._kv_heads = by, layer.num_kv_heads
        self._q: Tensor | float = 0.0  # [H, D]
        self._k: Tensor | float = 0.0  # [Hkv, D]

    def observe(self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> None:
        self._q = self._q + q.double().abs().sum((0, 2)).cpu()
        self._k = self._k + k.double().abs().sum((0, 2)).cpu()

    def weights(self) -> dict[str, Tensor]:
        assert isinstance(self._q, Tensor) and isinstance(self._k, Tensor)
        q = self._q.unflatten(0, (self._kv_heads, -1)).mean(1)  # [Hkv, D]
        score = {"q": q, "k": self._k, "qk": q * self._k}[self._by]
        return {"channels": score.argsort(dim=-1, descending=True, stable=True).int()}
