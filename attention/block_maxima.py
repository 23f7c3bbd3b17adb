"""Prefill methods that estimate the largest attention probability in each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .keys import Keys
from .method import AttentionMethod, LayerInfo


class BlockMaxima(NamedTuple):
    """log_maxima [1, H, Nq, Nk]: the natural log of the largest probability in each block of ``block_q``
    queries and ``block_k`` keys, or a bound above it; -inf where no query sees a key of the block."""

    log_maxima: Tensor
    block_q: int
    block_k: int


@dataclass(frozen=True, kw_only=True)
class EstimatesBlockMaxima(AttentionMethod):
    """Base of such methods. ``act`` goes over one of them: the maxima tell it which keys cannot be sinks."""

    def for_layer(self, layer: LayerInfo) -> EstimatesBlockMaxima | None:
        return None if layer.index < self.dense_layers else self

    def block_maxima(self, q: Tensor, keys: Keys) -> BlockMaxima:
        """The estimates for the prefill queries q [1, H, Tq, D]."""
        raise NotImplementedError(f"{type(self).__name__} lacks block_maxima.")
