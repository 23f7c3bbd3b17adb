"""MInference's static A-shape head: the first blocks and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..blocks import Grid
from ..checks import require
from ..cost import Cost, Queries
from ..keys import Keys
from ..method import AttentionMethod
from ..selection import Index
from .static_blocks import a_shape, near_and_sink_blocks, same_for_all_heads


@dataclass(frozen=True, kw_only=True)
class AShape(AttentionMethod):
    """The first blocks and the last: MInference's static A-shape head (2407.02490), in whole blocks.

    A block of ``block`` queries reads the key blocks that hold the first ``sinks`` keys, and those that hold
    the last w keys of any of its queries. Query blocks are counted from the row's first position, wherever a
    prompt is cut. The defaults are those of MInference's StreamingLLM baseline. ``window`` is the same
    pattern token by token. Decode is dense.
    """

    name: ClassVar[str] = "a_shape"
    title: ClassVar[str] = "A-shape (MInference's static pattern)"
    paper: ClassVar[str] = "2407.02490"

    w: int = 4096
    sinks: int = 1024
    block: int = 64

    def __post_init__(self) -> None:
        require(self, w=(1, None), sinks=(0, None), block=(1, None))

    def reads(self, queries: Queries) -> Cost:
        first, sinks = near_and_sink_blocks(queries, self.w, self.sinks, self.block)
        keys = queries.seen + (sinks - first).clamp(max=0) * self.block
        reach = self.w + 2 * (self.block - 1) + sinks * self.block
        return queries.cost(keys, reach=reach)

    def select_prefill(self, q: Tensor, keys: Keys) -> Index:
        if keys.longest() <= self.w + self.sinks:
            return None
        grid = Grid.anchored(keys, self.block)
        return same_for_all_heads(grid, a_shape(grid, self.w, self.sinks), keys)
