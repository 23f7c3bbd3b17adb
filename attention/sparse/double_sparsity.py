"""Double Sparsity: token selection by a few calibrated channels of each key."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..budget import budget, budget_at, check_budget, max_budget, select_topk
from ..calibration.double_sparsity import ChannelRanking
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..gqa import by_heads, group_scores
from ..keys import Keys
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..ops.append import Labels
from ..ops.scores import scores
from ..partial import Partial
from ..selection import Index, TokenIndex
from ..softmax import Softmax
from ..static_step import EveryKeyStep, StaticKeys, StaticStep, store
from ..summary import Channels, Summary
from ..topk_step import TopKStep, covers
from .rounded_labels import BITS, RoundedChannels, label_bytes

Labelled = Channels | RoundedChannels
LABELS = 32  # channels of a key, where no group_factor is given


@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(AttentionMethod):
    """Exact attention over the top-k keys by q_label . k_label on calibrated channels (Double Sparsity,
    2408.07092).

    Offline, ``farspan calibrate`` ranks each KV head's channels by mean |q|, |k| or |q k| on text the user
    names. At decode a label cache holds the first D / group_factor ranked channels of every key, per KV head,
    kept incrementally; without a group_factor the first 32, as in the paper's 32 of 128. Labels score all
    keys, and the best k are read exactly. Query heads of a group have one selection, by the ``gqa_reduce``
    ("sum" or "max") of their estimated attention, or one each ("none"). label_bits: labels are kept in 4 or 2
    bits; None: in the dtype of the keys. Layers below ``dense_layers`` stay dense; prefill is dense.
    """

    name: ClassVar[str] = "double_sparsity"
    title: ClassVar[str] = "Double Sparsity"
    paper: ClassVar[str] = "2408.07092"

    k: int | None = 512
    fraction: float | None = None
    group_factor: int | None = None
    gqa_reduce: str = "sum"
    label_bits: int | None = None
    dense_layers: int = 2
    recipe: str = ""
    labels: Channels | RoundedChannels | None = field(
        default=None, repr=False, compare=False, metadata={"spec": False}
    )

    def __post_init__(self) -> None:
        check_budget(self, self.k, self.fraction)
        require(self, group_factor=(1, None), gqa_reduce=("sum", "max", "none"), dense_layers=(0, None))
        if self.label_bits not in (None, *BITS):
            raise SpecError(f"double_sparsity takes label_bits = 4 or 2, or none; got {self.label_bits!r}.")

    @property
    def needs(self) -> Needs:
        return Needs(weights={"channels": ("num_kv_heads", "head_dim")})

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        if layer.index < self.dense_layers:
            return None
        ranking = layer.own(layer.checked(self)["channels"])  # [Hkv, D], best first
        width = self._width(layer.head_dim)
        labels = Channels(ranking[:, :width].sort(-1).values.long())
        rounded = labels if self.label_bits is None else RoundedChannels(labels, self.label_bits)
        return replace(self, labels=rounded)

    def _width(self, head_dim: int) -> int:
        """Channels of a label."""
        return max(1, head_dim // self.group_factor) if self.group_factor else min(LABELS, head_dim)

    def calibration(self, layer: LayerInfo, *, by: str = "qk") -> ChannelRanking:
        """by: "q" or "k" ranks a channel by its mean magnitude before RoPE; "qk" by the mean of |q_c k_c|
        over pairs of query and key after RoPE, which is the product of the two mean magnitudes. The query
        heads of a group have one mean."""
        return ChannelRanking(layer, by)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return () if self.labels is None else (self.labels,)

    def reads(self, queries: Queries) -> Cost:
        size = budget_at(self.k, self.fraction, queries.length)
        if size >= queries.length:
            return queries.cost()
        width, key = self._width(queries.head_dim), queries.head_dim * queries.element_size
        bits = self.label_bits
        label = width * queries.element_size if bits is None else label_bytes(width, bits)
        labels = queries.raw_keys(queries.length * label / key)
        return queries.cost(queries.seen.clamp(max=size), selection=labels, candidates=size)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        size = budget(self.k, self.fraction, keys)
        if isinstance(size, int) and size >= keys.longest():
            return None
        assert self.labels is not None, "for_layer was not called"
        labels = keys.summary(self.labels)  # [B, Hkv, N, width], N of the Tk keys held here
        channels = self.labels.on(q.device, q.shape[1] // keys.kv.num_kv_heads)
        q_labels = q.gather(3, channels[None, :, None].expand(*q.shape[:3], -1))
        score = self.labels.scores if isinstance(self.labels, RoundedChannels) else scores
        visible = keys.visible()

        def rank(q: Tensor, labels: Tensor) -> Tensor:
            return group_scores(score(q, labels, keys.softmax), visible, self.gqa_reduce, keys.peers)

        # Ranks meet in ``group_scores``, and each of them has its own number of keys.
        ranked = by_heads(rank, q_labels, labels) if keys.peers is None else rank(q_labels, labels)
        most = max_budget(self.k, self.fraction, keys)
        tokens, counts = select_topk(ranked, size, most, keys.peers, every=most <= keys.fewest())
        return TokenIndex(tokens=tokens, counts=counts)

    @property
    def has_static_step(self) -> bool:
        return self.label_bits is None

    def static_step(self, keys: StaticKeys) -> StaticStep | None:
        assert isinstance(self.labels, Channels), "for_layer was not called"
        if covers(self.k, self.fraction, keys):
            return EveryKeyStep()
        return LabelsStep(k=self.k, fraction=self.fraction, labels=self.labels, reduce=self.gqa_reduce)


@dataclass(frozen=True, kw_only=True)
class LabelsStep(TopKStep):
    """The step of ``double_sparsity`` where it leaves keys out."""

    name: ClassVar[str] = "labels"

    labels: Channels

    @property
    def summary(self) -> Summary:
        return self.labels

    def run(self, q: Tensor, keys: StaticKeys, softmax: Softmax) -> Partial:
        entries, channels = keys.entries(self.labels), self.labels.on(q.device)
        store(keys, labels=Labels(entries, channels))
        return self.attend(q, keys, entries, softmax, channels=channels)
