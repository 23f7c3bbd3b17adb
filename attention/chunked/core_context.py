"""Core Context Aware Attention: groups of earlier tokens are read as one core token each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..method import AttentionMethod, LayerInfo
from ..selection import Index, Summarised
from ..summary import Summary
from .block_values import CoreTokens, read_entries


@dataclass(frozen=True, kw_only=True)
class CoreContext(AttentionMethod):
    """CCA-Attention (2412.12465): s to s + g - 1 local keys, and a core token for each g tokens before them.

    Groups of g tokens count from the first token of the row. The core of group j has the key and the value

        softmax(q_last K_group^T / sqrt(D)) [K_group, V_group]

    of the keys after RoPE, where q_last is the query of the group's last token. The query at position i reads
    the cores j < floor((i + 1 - s) / g) and its last s + ((i + 1) mod g) keys, in one softmax.

    g has to divide s: only then do cores and local keys neither overlap nor leave a gap. The official code
    computes a core for each query head, so that a model with grouped heads loses their saving. Here a KV head
    has one core, by the mean query of its group. A model without grouped heads has the cores of the paper.

    There are no weights: it runs on any model, and is meant to be fine-tuned. Its laws are its own: with
    fewer than s + g keys it is dense attention exactly, from s + g keys on it never is. Chunks of a prompt
    may be cut anywhere. The cache keeps N / g cores and the last s + g keys; older keys are dropped.
    The queries of the last g + max(g, 32) tokens are kept, too: a crop that opens an earlier group is
    refused.

    In a layer that attends with another scale than 1 / sqrt(D) (Granite, Gemma), the core's softmax has that
    scale. A soft-cap is applied where cores are read, and not where they are pooled.
    """

    name: ClassVar[str] = "core_context"
    title: ClassVar[str] = "Core Context Aware Attention (CCA)"
    paper: ClassVar[str] = "2412.12465"

    g: int = 16
    s: int = 1024
    scale: float | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, g=(1, None), s=(1, None))
        if self.s % self.g:
            raise SpecError(
                "core_context takes an s that g divides, else cores and local keys overlap or leave a gap; "
                f"got g={self.g}, s={self.s}."
            )

    def for_layer(self, layer: LayerInfo) -> AttentionMethod:
        return replace(self, scale=layer.scale)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (self._cores,)

    @property
    def _cores(self) -> CoreTokens:
        return CoreTokens(self.g, self.scale)

    @property
    def keys_needed(self) -> int:
        return self.s + self.g

    def reads(self, queries: Queries) -> Cost:
        cores = ((queries.seen - self.s) // self.g).clamp(min=0)
        return queries.cost(queries.seen - cores * (self.g - 1))

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def _select(self, keys: Keys) -> Index:
        if keys.longest() < self.s + self.g:
            return None
        return Summarised(block=self.g, local=self.s, levels=(read_entries(keys, self._cores),))
