"""Combiner: earlier spans of a text are read as one key and value each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..method import AttentionMethod, LayerInfo
from ..selection import Index, Summarised
from ..summary import Summary
from .block_values import Spans, read_entries


@dataclass(frozen=True, kw_only=True)
class Combiner(AttentionMethod):
    """Combiner (2107.05768): the keys of the query's own block, and summaries of the spans before it, in one
    softmax.

    Blocks of ``span`` tokens count from the first token of the row. A span of one or more blocks is read as

        key    maxpool(K_span)
        value  softmax(maxpool(Q_span) K_span^T / sqrt(D)) V_span

    and only when it is finished, so that a query never sees a later token. Keys and queries are those after
    RoPE. The paper has as many KV heads as query heads; in a group of query heads, maxpool(Q) is here the
    largest over the group's heads, too, so that a KV head has one summary.

    form: "fixed": a query reads the summaries of all earlier blocks. "logsparse": spans of 1, 2, 4, ...
    blocks; of c earlier blocks it reads one span for each bit of c that is set. The paper's logsparse form
    begins with spans of one token: ``span=1``. Spans double up to the last size that is at most ``largest``
    (512 with span=64, largest=1000), and a longer text is read as several of the largest ones.
    count_correction: add log(tokens of the span) to the logit of a summary, after a soft-cap, so that it
    weighs as that many tokens do; off, as in the paper.

    There are no weights: it runs on any model, and is meant to be trained. Its laws are its own: it is dense
    attention exactly while a row has no more than ``span`` tokens. Chunks of a prompt may be cut anywhere.
    In a layer that attends with another scale than 1 / sqrt(D) (Granite, Gemma), a summary's softmax has that
    scale. A soft-cap is applied where summaries are read, and not where they are pooled.

    The cache keeps the summaries, the keys from the last open span on, and the queries of all heads of the
    last L + max(L, 32) tokens, where L is the size of the largest spans: ``span`` in the fixed form. A crop
    that opens a span before these queries again is refused. Of N tokens the fixed form keeps N / span
    summaries, each of the bytes of a token's keys and values. The logsparse form keeps those of all levels,
    almost 2 N / span: with span=1 it keeps 2 to 3 times the bytes of dense attention.
    """

    name: ClassVar[str] = "combiner"
    title: ClassVar[str] = "Combiner"
    paper: ClassVar[str] = "2107.05768"

    form: str = "fixed"
    span: int = 64
    largest: int = 1024
    count_correction: bool = False
    scale: float | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, form=("fixed", "logsparse"), span=(1, None), largest=(1, None))
        if self.form == "logsparse" and self.largest < self.span:
            raise SpecError(
                f"combiner takes a largest span of at least span={self.span} tokens; got "
                f"largest={self.largest}."
            )

    def for_layer(self, layer: LayerInfo) -> AttentionMethod:
        return replace(self, scale=layer.scale)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return self._spans

    @property
    def keys_needed(self) -> int:
        return self._spans[-1].block + 1

    @property
    def _spans(self) -> tuple[Spans, ...]:
        """By level, the summary of spans of 2^level blocks."""
        levels = (self.largest // self.span).bit_length() if self.form == "logsparse" else 1
        return tuple(Spans(self.span << level, self.scale) for level in range(levels))

    def reads(self, queries: Queries) -> Cost:
        behind = (queries.seen - 1) // self.span
        top = len(self._spans) - 1
        spans = sum((behind >> level & 1 for level in range(top)), behind >> top)
        return queries.cost(queries.seen - self.span * behind + torch.as_tensor(spans))

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def _select(self, keys: Keys) -> Index:
        if keys.longest() <= self.span:
            return None
        return Summarised(
            block=self.span,
            local=1,
            levels=tuple(read_entries(keys, summary) for summary in self._spans),
            bias=tuple(math.log(x.block) if self.count_correction else 0.0 for x in self._spans),
        )
