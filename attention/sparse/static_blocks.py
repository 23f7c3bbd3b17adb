"""Blocks chosen by their positions alone: what a_shape and block_static share."""

from __future__ import annotations

from torch import Tensor

from ..blocks import Grid
from ..cost import Queries
from ..keys import Keys
from ..ops.select import by_threshold
from ..selection import BlockIndex


def near_and_sink_blocks(queries: Queries, w: int, sinks: int, block: int) -> tuple[Tensor, int]:
    """For each query [N] the first of the blocks that hold its query block's last w keys, and how many
    blocks the sinks take."""
    begin = (queries.seen - 1) // block * block
    return (begin - (w - 1)).clamp(min=0) // block, -(-sinks // block)


def a_shape(grid: Grid, w: int, sinks: int) -> Tensor:
    """[Nq, Nk] bool: the blocks of the first ``sinks`` keys and of the last w of any query of a block."""
    return grid.between(grid.local(w), grid.last) | (
        (grid.cols * grid.block_k < sinks) & (grid.cols <= grid.last[:, None])
    )


def same_for_all_heads(grid: Grid, read: Tensor, keys: Keys) -> BlockIndex:
    """An index of the blocks in ``read`` [Nq, Nk] (bool) for every head."""
    blocks, counts = by_threshold(read.float(), 0.5)
    shape = keys.kv.shape[:2]
    return BlockIndex(
        blocks=blocks.int().expand(*shape, -1, -1).contiguous(),
        counts=counts.expand(*shape, -1).contiguous(),
        block_q=grid.block_q,
        block_k=grid.block_k,
        lead=keys.past % grid.block_q,
    )
