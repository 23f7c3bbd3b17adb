"""Descriptors: earlier chunks are read as pooled keys and values, and the first chunk as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..method import AttentionMethod
from ..selection import Index, Summarised
from ..summary import Summary
from .block_values import Means, read_entries


@dataclass(frozen=True, kw_only=True)
class Descriptors(AttentionMethod):
    """FlashVGGT's descriptor attention (2512.01540), carried from images to text.

    Chunks of ``chunk`` tokens count from the first token of the row. The query at position i, in chunk c,
    reads in one softmax

        the anchor     all keys of chunk 0
        descriptors    the mean key and the mean value of each ``pool`` tokens of the chunks 1 .. c - 1
        its own chunk  the keys from position c * chunk to i

    pool has to divide chunk. At pool=1 it is dense attention exactly, and at any pool while a row has no more
    than two chunks.

    In the paper the query's own chunk is pooled, too; here it is not, because a text's last tokens matter
    most. The paper's camera tokens and key frames have no counterpart. The paper pools hidden states, makes
    keys and values of them, and rotates each key by one position of its area. Here keys are pooled as they
    are stored, after RoPE. So nothing but keys and values is needed, models without RoPE are served, and the
    logit of a descriptor is the mean logit of its tokens at their own positions.

    count_correction: add log(pool) to the logit of a descriptor, after a soft-cap, so that it weighs as that
    many tokens do; off, as in the paper, where a descriptor counts as one key.

    There are no weights: it runs on any model, and is meant to be trained. Chunks of a prompt may be cut
    anywhere. The cache keeps the anchor, the descriptors of all chunks (N / pool of N tokens, each of the
    bytes of a token's keys and values) and the keys of the last chunk; the others are dropped. The anchor
    and the descriptors are kept as plain numbers on the device, whatever the storage of the keys is.
    """

    name: ClassVar[str] = "descriptors"
    title: ClassVar[str] = "Descriptor attention (FlashVGGT)"
    paper: ClassVar[str] = "2512.01540"

    chunk: int = 1024
    pool: int = 16
    count_correction: bool = False

    def __post_init__(self) -> None:
        require(self, chunk=(1, None), pool=(1, None))
        if self.chunk % self.pool:
            raise SpecError(
                "descriptors takes a chunk that pool divides, so that no descriptor spans two chunks; got "
                f"chunk={self.chunk}, pool={self.pool}."
            )

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return self._anchor, self._pooled

    @property
    def _anchor(self) -> Means:
        return Means(1, most=self.chunk)

    @property
    def _pooled(self) -> Means:
        return Means(self.pool)

    @property
    def keys_needed(self) -> int:
        return self.chunk + 1

    def reads(self, queries: Queries) -> Cost:
        pooled = ((queries.seen - 1) // self.chunk - 1).clamp(min=0) * self.chunk
        return queries.cost(queries.seen - pooled + pooled // self.pool)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        return self._select(keys)

    def _select(self, keys: Keys) -> Index:
        if keys.longest() <= self.chunk:
            return None
        return Summarised(
            block=self.pool,
            step=self.chunk // self.pool,
            local=1,
            anchor=read_entries(keys, self._anchor),
            levels=(read_entries(keys, self._pooled),),
            bias=(math.log(self.pool) if self.count_correction else 0.0,),
        )
