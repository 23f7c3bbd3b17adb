"""Decode over a KV cache that is spread over ranks: every rank has the queries, each attends to the keys it
holds, and one collective brings the partial results together."""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.attend import Reads, count_reads, explained
from ...attention.method import DECODE, AttentionMethod
from ...attention.partial import Partial, merge
from ...attention.selection import Selection, Window, as_selection
from ...attention.selection.here import count_visible
from ..group.comm import Ranks, pack, unpack
from .keys import ShardedKeys


def decode(
    method: AttentionMethod, q: Tensor, keys: ShardedKeys, window: int | None
) -> tuple[Partial, Reads]:
    """Attention of q [B, H, Tq, D], the same on every rank, over what ``method`` (or the model's own
    ``window``) selects of all ranks' keys. -> the same Partial on every rank; Reads counts this rank's part.
    """
    if window is None:
        selection: Selection = as_selection(method.select_decode(q, keys), DECODE)
    else:
        selection = Window(size=window)
    part, pairs = selection.run_decode_here(q, keys)
    visible = (int(count_visible(keys).sum()) + _dropped(keys)) * q.shape[1]
    shared_by = selection.loads_shared_by(q.shape[1], keys.kv.num_kv_heads)
    reads = count_reads(q, keys.kv, pairs, visible, shared_by)
    return merge_ranks(part, q.dtype, keys.ranks), explained(reads, method, DECODE, keys, selection)


def _dropped(keys: ShardedKeys) -> int:
    """This rank's share of the (query, key) pairs that dense attention would read and whose keys no rank
    stores any more."""
    assert keys.peers is not None
    gone = sum(max(0, keys.layout.begin - first) for first in keys.starts or [0] * keys.kv.batch)
    gone += sum(keys.evicted or ())
    return len(keys.peers.share(gone * keys.tq))


def merge_ranks(part: Partial, dtype: torch.dtype, ranks: Ranks) -> Partial:
    """Merge every rank's partial in the order of ranks. Sends (P - 1) (D e + 4) bytes per query head, e of
    ``dtype``, which is what out is rounded to for the way."""
    mine = (part.out.to(dtype).contiguous(), part.lse)
    outs, lses = unpack(ranks.all_gather(pack(*mine), "partials"), *mine)
    return merge(*(Partial(out, lse) for out, lse in zip(outs, lses, strict=True)))
