"""ChunkLLM: decode reads the best chunks of text, which are chosen anew where a chunk ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..budget import budget_at, check_budget
from ..checks import require
from ..cost import Cost, Queries
from ..errors import FarspanError
from ..keys import Keys
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..selection import Index
from ..summary import Summary
from .adapters import Adapters, ChunkEnds, CompressedKeys
from .chosen_chunks import ChosenChunks
from .chunk_loss import chunk_loss


@dataclass(frozen=True, kw_only=True)
class ChunkLLM(AttentionMethod):
    """Chunks of text, found by a learned boundary adapter, and chosen by learned compressed queries and keys
    (2510.02361). Needs a recipe of ``farspan train chunkllm``.

    A linear layer on the hidden states of layer ``boundary_layer``, as its attention gets them (1, the
    default: the output of the first layer, behind a norm), gives the probability that a token ends a chunk;
    above ``alpha`` it does. It is trained towards the ends of sentences. Adapters in each layer compress
    queries and keys, and the scores of chunks by them are trained towards the model's attention.

    At decode a set of keys is chosen by a prompt's last query, and then only by tokens that end a chunk: the
    tokens of the best chunks within the budget (``k`` tokens or a ``fraction`` of the visible keys). A chunk
    that fits in part is read from its beginning on. Other steps read the set and all tokens since.

    Decided here, as the paper does not say: the score of a chunk is the product of the compressed query and
    the mean of its compressed keys; its softmax learns the attention mass of each chunk, meaned over the
    group; selection per layer and KV head, the group's queries side by side, vectors of ``gate_dim`` after
    RoPE; the chunk of the choosing query and the first ``sinks`` tokens are always in the set; one boundary
    adapter per layer, all of them alike; a chunk of more than ``longest`` tokens is cut, and the set is
    chosen anew ``longest`` tokens after the last choice; prefill and layers below ``boundary_layer`` are
    dense. The paper's voting is not built: we could not verify what it is. A row reads everything up to ``k``
    keys and at the next step, which chooses; so does the next step after a crop.
    """

    name: ClassVar[str] = "chunkllm"
    title: ClassVar[str] = "ChunkLLM"
    paper: ClassVar[str] = "2510.02361"
    trained_with: ClassVar[tuple[str, ...]] = ("gate_dim", "boundary_layer")

    k: int | None = None
    fraction: float | None = 0.5
    alpha: float = 0.5
    longest: int = 128
    sinks: int = 4
    gate_dim: int = 32
    boundary_layer: int = 1
    dense_layers: int = 0
    recipe: str = ""
    adapters: Adapters | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        check_budget(self, self.k, self.fraction)
        require(self, alpha=(0.0, 1.0), longest=(1, None), sinks=(0, None), gate_dim=(1, None))
        require(self, boundary_layer=(0, None), dense_layers=(0, None))

    @property
    def needs(self) -> Needs:
        weights: Mapping[str, tuple[int | str | None, ...]] = {
            "q": ("num_kv_heads", self.gate_dim, None),
            "k": ("num_kv_heads", self.gate_dim, "head_dim"),
            "boundary.weight": (1, None),
            "boundary.bias": (1,),
        }
        return Needs(early_hidden_states=self.boundary_layer, sentence_ends=True, weights=weights)

    @property
    def module(self) -> nn.Module | None:
        return self.adapters

    def for_layer(self, layer: LayerInfo) -> AttentionMethod | None:
        if self._leaves_dense(layer):
            return None
        given = {n: layer.own(x) if n in ("q", "k") else x for n, x in layer.checked(self).items()}
        adapters = Adapters(layer, self.gate_dim, given["boundary.weight"].shape[1])
        adapters.load_state_dict(given)
        return replace(self, adapters=adapters)

    def for_training(self, layer: LayerInfo) -> AttentionMethod | None:
        if self._leaves_dense(layer):
            return None
        return replace(self, adapters=Adapters(layer, self.gate_dim, layer.hidden_size))

    def _leaves_dense(self, layer: LayerInfo) -> bool:
        """Raises FarspanError where the model has no layer ``boundary_layer``."""
        if 0 < layer.num_layers <= self.boundary_layer:
            raise FarspanError(
                f"chunkllm's boundary_layer is at most {layer.num_layers - 1} in this model of "
                f"{layer.num_layers} layers; got {self.boundary_layer}."
            )
        return layer.index < max(self.boundary_layer, self.dense_layers)

    def distillation_loss(self, q: Tensor, keys: Keys) -> Tensor:
        """The divergence of the chunks' scores from the teacher's attention, plus the cross-entropy of the
        boundaries. ``keys.inputs`` feeds ``early_hidden_states`` and ``sentence_ends``."""
        assert self.adapters is not None
        return chunk_loss(self.adapters, q, keys, self.longest)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return () if self.adapters is None else (self._chosen.compressed, self._chosen.ends)

    def reads(self, queries: Queries) -> Cost:
        """At most, as if every step chose: where chunks end depends on the text."""
        length = queries.length
        size = max(budget_at(self.k, self.fraction, length), min(length, self.sinks + self.longest))
        if self.k is not None and self.k >= length:
            return queries.cost()
        labels = length * self.gate_dim / queries.head_dim
        labels += length / (queries.head_dim * queries.element_size)  # the ends, a byte for all KV heads
        keys = queries.seen.clamp(max=size + self.longest)
        return queries.cost(keys, selection=queries.raw_keys(labels), exact=False)

    @torch.no_grad()
    def on_prefill_end(self, q: Tensor, keys: Keys) -> None:
        self._chosen.begin(q, keys)

    @torch.no_grad()
    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        if self._chosen.covers(keys):
            keys.state.clear()
            return None
        return self._chosen.decode(q, keys)

    @property
    def _chosen(self) -> ChosenChunks:
        assert self.adapters is not None, "for_layer was not called"
        return ChosenChunks(
            compressed=CompressedKeys(self.adapters),
            ends=ChunkEnds(self.adapters, self.alpha),
            k=self.k,
            fraction=self.fraction,
            longest=self.longest,
            sinks=self.sinks,
        )
