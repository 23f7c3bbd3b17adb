"""Block-sparse FlashAttention: a fixed mask over blocks of queries and of keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks import Grid
from ..checks import require
from ..cost import Cost, Queries
from ..errors import FarspanError, SpecError
from ..keys import Keys
from ..method import AttentionMethod
from ..selection import Index
from .static_blocks import a_shape, near_and_sink_blocks, same_for_all_heads


@dataclass(frozen=True, kw_only=True)
class BlockStatic(AttentionMethod):
    """A fixed mask over blocks of queries and of keys: block-sparse FlashAttention (2205.14135).

    pattern: "butterfly", the one that paper takes (the flat block butterfly of 2112.00029): query block i
    reads key block j <= i where i and j differ in no bit or in one, below ``stride`` blocks where that is
    given; or "given", the causal part of ``mask`` [blocks, blocks] (bool, row i for query block i, both
    counted from position 0), which is passed from Python: BlockStatic(pattern="given", mask=...).

        butterfly      j   0 1 2 3 4 5 6 7
                     i 5   . x . . x x . .
                       6   . . x . x . x .
                       7   . . . x . x x x

    The query block's own key block is always read; besides, the blocks that hold the first ``sinks`` keys and
    the last w of any of its queries. Query blocks are counted as in a_shape. Decode is dense.
    """

    name: ClassVar[str] = "block_static"
    title: ClassVar[str] = "Static block masks (block-sparse FlashAttention)"
    paper: ClassVar[str] = "2205.14135"

    pattern: str = "butterfly"
    block: int = 128
    stride: int | None = None
    w: int = 1
    sinks: int = 0
    mask: Tensor | None = field(default=None, repr=False, compare=False, metadata={"spec": False})

    def __post_init__(self) -> None:
        require(self, pattern=("butterfly", "given"), block=(1, None), w=(1, None), sinks=(0, None))
        require(self, stride=(2, None))
        if (self.pattern == "given") != (self.mask is not None):
            raise SpecError(
                "block_static takes a mask with pattern='given', and only there: "
                "BlockStatic(pattern='given', mask=...)."
            )
        square = self.mask is None or (self.mask.dim() == 2 and self.mask.shape[0] == self.mask.shape[1])
        if not square or (self.mask is not None and self.mask.dtype != torch.bool):
            assert self.mask is not None
            raise SpecError(
                "block_static takes a mask of as many query blocks as key blocks, bool; got "
                f"{list(self.mask.shape)} of {self.mask.dtype}."
            )

    def reads(self, queries: Queries) -> Cost:
        first, sinks = near_and_sink_blocks(queries, self.w, self.sinks, self.block)
        between = self._between(queries, first, sinks)
        return queries.cost(queries.seen + ((sinks - first).clamp(max=0) + between) * self.block)

    def _between(self, queries: Queries, first: Tensor, sinks: int) -> Tensor:
        """[N]: blocks of the pattern from ``sinks`` on and below ``first`` [N], for each query."""
        row = (queries.seen - 1) // self.block
        if self.mask is not None:
            if queries.length > self.w + self.sinks:
                self._check_mask(-(-queries.length // self.block))
            below = pad(self.mask.cpu().long().cumsum(1), (1, 0))  # [blocks, blocks + 1]
            row, first = (x.clamp(max=len(self.mask)) for x in (row, first))
            row = row.clamp(max=len(self.mask) - 1)
            return (below[row, first] - below[row, min(sinks, len(self.mask))]).clamp(min=0)
        found, bit = torch.zeros_like(row), 1
        while bit < min(self.stride or 1 << 62, int(row.max()) + 1):
            other = row - bit
            found += ((row & bit) > 0) & (other >= sinks) & (other < first)
            bit *= 2
        return found

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if keys.longest() <= self.w + self.sinks:
            return None
        grid = Grid.anchored(keys, self.block)
        read = self._rows(grid.first, grid) | a_shape(grid, self.w, self.sinks)
        return same_for_all_heads(grid, read, keys)

    def _rows(self, i: Tensor, grid: Grid) -> Tensor:
        """[Nq, Nk] bool: what the pattern's rows i [Nq] read."""
        j = grid.cols
        if self.mask is not None:
            self._check_mask(len(j))
            return self.mask.to(i.device)[i][:, : len(j)] & (j <= i[:, None])
        differ = i[:, None] ^ j
        one_bit = (differ & (differ - 1)) == 0
        near = differ < (self.stride or 1 << 62)
        return one_bit & near & (j <= i[:, None])

    def _check_mask(self, blocks: int) -> None:
        if self.mask is not None and blocks > len(self.mask):
            raise FarspanError(
                f"block_static was given a mask of {len(self.mask)} blocks of {self.block} tokens, which is "
                f"{len(self.mask) * self.block} tokens, for a sequence of more: pass a larger one."
            )
