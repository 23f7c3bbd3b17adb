"""SALE: blocks kept where a four-bit estimate of some logit is large against what is read anyway."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..block_maxima import BlockMaxima, EstimatesBlockMaxima
from ..blocks import Grid
from ..calibration.sale import ThresholdSearch
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..lookahead import Lookahead
from ..method import LayerInfo
from ..needs import Needs
from ..ops.select import by_threshold
from ..selection import BlockIndex, Index
from ..summary import Summary
from .int4_keys import Int4Keys
from .sale_estimate import estimate_blocks


@dataclass(frozen=True, kw_only=True)
class SALE(EstimatesBlockMaxima):
    """Reads the blocks of ``block_q`` queries and ``block_k`` keys in which the estimated attention of some
    pair is not small beside that of the sink and the local keys (SALE, 2505.24179).

    The first pass is exact: each query's row max m and row sum l over the first block of keys and the blocks
    with the last ``local`` keys of a query block, which are always read. The second pass estimates the logits
    s of all other pairs with keys in four bits. The relative attention score of a pair is exp(s - m) / l, and
    a block is read if some pair in it reaches the head's threshold tau. Logarithms are compared: s - (m + log
    l) and log tau.

    tau is calibrated per head (``farspan calibrate --method sale``) and kept in the recipe, or is
    ``threshold`` for all heads. A head with tau <= 1e-4 reads everything. Queries that see at most
    ``dense_below`` keys read everything too, wherever a prompt is cut (the authors: calls of at most 1,024
    queries).

    Keys are rounded around the mean of their block, which is added back exactly, since the paper's mean of
    all keys changes with every new key. Queries keep their mean and are rounded to ``q_bits`` = 8 bits (None:
    not at all); the paper subtracts the mean and uses 4. Every pair is estimated, which is fast only where
    there is four-bit arithmetic; on the CPU there is none. Decode is dense.
    """

    name: ClassVar[str] = "sale"
    title: ClassVar[str] = "SALE"
    paper: ClassVar[str] = "2505.24179"
    dense_threshold: ClassVar[float] = 1e-4  # a head with a threshold no higher is dense

    threshold: float | None = None
    block_q: int = 64
    block_k: int = 32
    local: int = 128
    dense_below: int = 1024
    q_bits: int | None = 8
    recipe: str = ""
    log_tau: Tensor | None = field(default=None, repr=False, compare=False, metadata={"spec": False})
    selects: bool = field(default=True, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, threshold=(0.0, None), block_q=(1, None), block_k=(1, None), dense_below=(0, None))
        require(self, local=(self.block_q, None))
        if self.q_bits not in (4, 8, None):
            raise SpecError(f"sale takes q_bits = 4, 8 or none; got {self.q_bits}.")

    @property
    def needs(self) -> Needs:
        if self.threshold is not None:
            return Needs(keys=True)
        thresholds = {"thresholds": ("num_heads",)}
        return Needs(keys=True, weights=thresholds, instead="give threshold= for all heads")

    def for_layer(self, layer: LayerInfo) -> SALE:
        if self.threshold is not None:
            return self.with_thresholds(torch.full((layer.num_heads,), self.threshold))
        return self.with_thresholds(layer.own(layer.checked(self)["thresholds"]))

    def with_thresholds(self, tau: Tensor) -> SALE:
        """This method with these thresholds [H], one per query head."""
        log_tau = torch.where(tau <= self.dense_threshold, 0, tau.double()).log()
        return replace(self, log_tau=log_tau, selects=bool(log_tau.isfinite().any()))

    def calibration(self, layer: LayerInfo, *, start: float = 0.008, error: float = 0.4) -> ThresholdSearch:
        """Thresholds begin at ``start`` and are halved until the outputs of a head differ from dense
        attention's by less than ``error`` (absolute differences, summed over its numbers, mean over the
        queries).

        The defaults are the authors', for heads of 128 and prompts far longer than 4K. No threshold exceeds
        ``start``: SmolLM2 reads 0.53 of the pairs at 4K with them, and 0.29 with start=0.25, error=1.2."""
        return ThresholdSearch(self, layer, start, error)

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.of_block(self.block_q)

    @property
    def block_multiple(self) -> int:
        return math.lcm(self.block_q, self.block_k)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        return (Int4Keys(self.block_k),)

    def reads(self, queries: Queries) -> Cost:
        dense = self.threshold is not None and self.threshold <= self.dense_threshold
        if dense or self._covers(queries.length):
            return queries.cost()
        first_pass = queries.raw_keys(self.block_k + queries.length)
        return queries.cost(selection=first_pass + queries.entries(*self.summaries), exact=False)

    def _covers(self, length: int) -> bool:
        return length <= max(self.dense_below, self.block_k)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        assert self.log_tau is not None, "for_layer was not called"
        if self._covers(keys.length) or not self.selects:
            return None
        return self.keep(self.estimate(q, keys), keys)

    def estimate(self, q: Tensor, keys: Keys) -> Tensor:
        """The largest log of a relative attention score in each block, [1, H, Nq, Nk]; inf where the first
        pass has read it, -inf where no query sees a key of it."""
        largest, read = self._estimate(q, keys)
        return largest.masked_fill_(read, torch.inf)

    def block_maxima(self, q: Tensor, keys: Keys) -> BlockMaxima:
        """Of all blocks, those of the first pass too. Its row sum is no more than the whole, so only the
        rounding of the logits can make an estimate too low."""
        return BlockMaxima(self._estimate(q, keys)[0].clamp_(max=0), self.block_q, self.block_k)

    def _estimate(self, q: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        grid = Grid.of(keys, self.block_q, self.block_k)
        return estimate_blocks(q, keys, grid, self.local, self.q_bits)

    def keep(self, largest: Tensor, keys: Keys) -> BlockIndex:
        """The blocks whose estimate [1, H, Nq, Nk] (of ``estimate``) reaches the threshold of their head."""
        assert self.log_tau is not None
        grid = Grid.of(keys, self.block_q, self.block_k)
        limit = self.log_tau.to(largest, non_blocking=True)[:, None]
        limit = limit.where(grid.end > self.dense_below, -torch.inf)  # [H, Nq]
        # One wait for the device: as wide as all blocks of keys, the lists would be larger than the keys.
        blocks, counts = by_threshold(largest, limit[None])
        return BlockIndex(blocks=blocks.int(), counts=counts, block_q=self.block_q, block_k=self.block_k)
