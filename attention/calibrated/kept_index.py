"""A selection for all queries of a call, kept among what ``prepare_prefill`` returns."""

from __future__ import annotations

import torch

from ..keys import Keys, State
from ..selection import BlockIndex

_BLOCKS, _COUNTS, _SHAPE = "kept_blocks", "kept_counts", "kept_shape"


def keep_index(index: BlockIndex, past: int) -> State:
    """``index`` as tensors, for a call whose first query is at position ``past``."""
    shape = torch.tensor([past, index.block_q, index.block_k])
    return {_BLOCKS: index.blocks, _COUNTS: index.counts, _SHAPE: shape}


def kept_index(keys: Keys, total: int) -> BlockIndex | None:
    """The index in ``keys.prepared``, where the queries are all those of the call, which has ``total`` keys;
    None for some of its queries, and where none is kept."""
    if _SHAPE not in keys.prepared:
        return None
    past, block_q, block_k = keys.prepared[_SHAPE].tolist()
    if (past, total) != (keys.past, keys.length):
        return None
    blocks, counts = keys.prepared[_BLOCKS], keys.prepared[_COUNTS]
    return BlockIndex(blocks=blocks, counts=counts, block_q=block_q, block_k=block_k)
