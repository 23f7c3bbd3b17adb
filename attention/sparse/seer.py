"""SeerAttention: blocks chosen by a learned gate over pooled queries and pooled keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..blocks import Grid, covering
from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..gqa import reduce_group
from ..keys import Keys, State
from ..lookahead import Lookahead
from ..method import AttentionMethod, LayerInfo
from ..needs import Needs
from ..selection import Index
from ..summary import Summary
from .gate import BlockGate, CompressedKeys, pool_queries
from .gate_loss import loss_of_blocks, observe_blocks


@dataclass(frozen=True, kw_only=True)
class Seer(AttentionMethod):
    """The key blocks that a learned gate scores highest for a block of queries (SeerAttention, 2410.13276).

    Per query head: mean-pooled queries [D] and concat(max, min, mean) [3 D] of keys, both before RoPE, over
    blocks of ``block``, are projected to d_g numbers, rotated by RoPE at the positions where their blocks
    begin, and multiplied. Softmax over the visible blocks of the products over sqrt(d_g) estimates the share
    of each block. The first block and the query block's own are always read, the best others as long as every
    budget given allows: ``k`` tokens, a ``fraction`` of the visible blocks, the ``mass`` of the estimates,
    estimates of at least ``threshold`` (published: 5e-4 to 5e-3). ``gqa_reduce``: "none", each head selects
    alone as in the paper, or one selection for a group by the mean ("sum") or the "max" of its shares.

    A recipe has k [Hkv, 3 D, d_g] and q [H, D, d_g], of ``gate_dim`` = d_g where farspan trains them; or, as
    in the published gates, k [H, 3 D, D] alone, for queries without a projection. Training starts from
    mean-pooled blocks: projections that keep d_g of the D numbers of the means. Its truth is the largest
    attention probability of each block, normalised per row; the first quarter of the rows is left out. Its
    loss (``gate_loss``) has the paper's divergence, and that of the blocks which are not always read.

    Departures: query blocks are counted from the row's first token, and a prompt may be read in chunks. The
    official code reads everything for the last two query blocks of a prompt. Here what a query reads does not
    depend on where the prompt ends. Decode is dense.
    """

    name: ClassVar[str] = "seer"
    title: ClassVar[str] = "SeerAttention"
    paper: ClassVar[str] = "2410.13276"
    trained_with: ClassVar[tuple[str, ...]] = ("block",)
    needs: ClassVar[Needs] = Needs(
        queries_before_rope=True, keys_before_rope=True, weights={"k": (None, None, None)}
    )

    k: int | None = None
    fraction: float | None = 0.2
    mass: float | None = None
    threshold: float | None = None
    block: int = 64
    gqa_reduce: str = "none"
    gate_dim: int = 32
    recipe: str = ""
    gate: BlockGate | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, k=(1, None), fraction=(1e-6, 1.0), mass=(1e-6, 1.0), threshold=(0, 1.0))
        require(self, block=(1, None), gqa_reduce=("sum", "max", "none"), gate_dim=(2, None))
        if (self.k, self.fraction, self.mass, self.threshold) == (None,) * 4:
            raise SpecError("seer takes a budget: k=TOKENS, fraction=, mass= or threshold=; got none.")
        if self.gate_dim % 2:
            raise SpecError(f"seer rotates pairs: gate_dim must be even; got gate_dim={self.gate_dim}.")

    @property
    def lookahead(self) -> Lookahead:
        return Lookahead.of_block(self.block)

    @property
    def block_multiple(self) -> int:
        return self.block

    @property
    def anchored_queries(self) -> bool:
        return True

    @property
    def module(self) -> BlockGate | None:
        return self.gate

    @property
    def summaries(self) -> tuple[Summary, ...]:
        size = self.gate_dim if self.gate is None else self.gate.entry
        return (CompressedKeys(self.block, size, self.gate),)

    def for_layer(self, layer: LayerInfo) -> AttentionMethod:
        return dataclasses.replace(self, gate=BlockGate.load(layer, layer.checked(self)))

    def for_training(self, layer: LayerInfo) -> AttentionMethod:
        return dataclasses.replace(self, gate=BlockGate.start(layer, self.gate_dim))

    def observed(self, q: Tensor, keys: Keys) -> State:
        return observe_blocks(q, keys, self.block)

    def loss_of(self, observed: State) -> Tensor:
        assert self.gate is not None
        return loss_of_blocks(self.gate, observed, self.block)

    def reads(self, queries: Queries) -> Cost:
        if self._covers(queries.length):
            return queries.cost()
        own = (queries.seen - 1) // self.block
        keys = queries.of_blocks(self._size(own), own, own, self.block)
        exact = self.mass in (None, 1) and not self.threshold
        return queries.cost(keys, selection=queries.entries(*self.summaries), exact=exact)

    def _covers(self, length: int) -> bool:
        whole = self.mass in (None, 1) and self.fraction in (None, 1) and not self.threshold
        return length <= 2 * self.block or (whole and (self.k is None or self.k >= length))

    def _size(self, last: Tensor) -> Tensor:
        """Blocks that a query block reads at most whose own block is ``last``."""
        share = ((last + 1) * (self.fraction or 1.0)).round().long()
        return (share if self.k is None else share.clamp(max=self.k // self.block)).clamp(min=2)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if self._covers(keys.length):
            return None
        assert self.gate is not None
        fed, entries = keys.inputs, keys.summary(*self.summaries)
        grid = Grid.anchored(keys, self.block)
        pooled = pool_queries(fed.queries_before_rope, self.block, keys.past % self.block)
        logits = self.gate.logits(pooled, grid.begin, entries, self.block, fed.frequencies)
        shares = logits.masked_fill(grid.cols > grid.last[:, None], -torch.inf).softmax(-1)
        group, shares = shares.shape[2], reduce_group(shares, self.gqa_reduce)
        if self.gqa_reduce == "sum":
            shares = shares / group
        forced = grid.between(grid.first, grid.last) | (grid.cols == 0)
        size = self._size(grid.last)
        if self.mass is not None and self.mass < 1:
            size = torch.minimum(size, covering(shares, forced, self.mass))
        if self.threshold:
            size = torch.minimum(size, (forced | (shares >= self.threshold)).sum(-1))
        ranked = shares.masked_fill(grid.cols > grid.last[:, None], -torch.inf)
        index = grid.choose(ranked, forced, size)
        return dataclasses.replace(index, lead=keys.past % self.block)
