"""What the gates of SeerAttention learn from a window of a text, and their loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..calibration.truth import block_truth, kl_of_rows, row_truth
from ..errors import FarspanError
from ..keys import Keys, State
from .gate import BlockGate, pool_keys, pool_queries

_ROWS = 16  # one of so many queries teaches a gate of single queries


def observe_blocks(q: Tensor, keys: Keys, block: int) -> State:
    """What a gate of query blocks learns from all queries q [B, H, T, D] of a window: pooled queries
    [B, H, N, D] and keys [B, Hkv, N, 3 D], and the true shares [B, H, R, N] of the last R blocks."""
    fed = keys.inputs
    seen = {
        "queries": pool_queries(fed.queries_before_rope, block, 0),
        "keys": pool_keys(fed.keys_before_rope, block),
        "truth": block_truth(q, keys, block, block)[:, :, first_row(keys, block) :].clone(),
    }
    return seen if fed.frequencies is None else {**seen, "frequencies": fed.frequencies}


def loss_of_blocks(gate: BlockGate, observed: State, block: int) -> Tensor:
    """``gate_loss`` of a gate of query blocks."""
    queries, truth = observed["queries"], observed["truth"]
    cols = torch.arange(queries.shape[2], device=queries.device)
    rows = cols[len(cols) - truth.shape[2] :]
    entries, frequencies = gate.compress_pooled(observed["keys"]), observed.get("frequencies")
    logits = gate.logits(queries[:, :, rows], rows * block, entries, block, frequencies).flatten(1, 2)
    logits = logits.masked_fill(cols > rows[:, None], -torch.inf)
    return gate_loss(logits, truth, (cols == 0) | (cols == rows[:, None]))


def observe_rows(q: Tensor, keys: Keys, block: int, heads: str) -> State:
    """What a gate of single queries learns from one of 16 queries in the second half of a window: the queries
    [B, H, R, D] at ``rows``, pooled keys [B, Hkv, N, 3 D], and the true shares [B, Hkv, G | 1, R, N] of
    ``heads`` (``row_truth``)."""
    fed, first = keys.inputs, max(first_row(keys, block) * block, keys.length // 2)
    rows = torch.arange(first, keys.length, _ROWS, device=q.device)
    seen = {
        "rows": rows,
        "queries": fed.queries_before_rope[:, :, rows],
        "keys": pool_keys(fed.keys_before_rope, block),
        "truth": row_truth(q, keys, rows, block, heads),
    }
    return seen if fed.frequencies is None else {**seen, "frequencies": fed.frequencies}


def loss_of_rows(gate: BlockGate, observed: State, block: int) -> Tensor:
    """``gate_loss`` of a gate of single queries, over the blocks before the query's own."""
    rows, truth = observed["rows"], observed["truth"]
    cols = torch.arange(truth.shape[4], device=truth.device)
    earlier = cols < rows[:, None] // block
    truth = truth.masked_fill(~earlier, 0)
    truth = truth / truth.sum(-1, keepdim=True).clamp(min=torch.finfo(truth.dtype).tiny)
    entries, frequencies = gate.compress_pooled(observed["keys"]), observed.get("frequencies")
    logits = gate.logits(observed["queries"], rows, entries, block, frequencies)
    return gate_loss(logits.masked_fill(~earlier, -torch.inf), truth, cols == 0)


def first_row(keys: Keys, block: int) -> int:
    """The first block of queries that a gate is trained on: the first quarter of a window is left out, and
    rows that see no block but the first and their own. Raises FarspanError for a window without others."""
    count = -(-keys.length // block)
    if count < 3:
        raise FarspanError(
            f"A gate with block={block} is trained on windows of more than {2 * block} tokens; got "
            f"{keys.length}: train on longer windows, or with a smaller block."
        )
    return max(2, count // 4)


def gate_loss(logits: Tensor, truth: Tensor, read: Tensor) -> Tensor:
    """What a gate is trained by: its KL divergence from the truth, and that of both without the blocks that
    are always read. A scalar, ``kl_of_rows`` of each.

    logits [..., N], -inf for blocks that a row does not see; truth [..., N], rows of the sum 1; read [..., N]
    bool, which leaves out at least one block that each row sees. The papers have the first term alone. The
    first and the own block hold most of the attention of many heads, and that term then teaches next to
    nothing about the others, which are all that a selection has to rank.
    """
    rest = truth.masked_fill(read, 0)
    rest = rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny)
    log_rest = logits.masked_fill(read, -torch.inf).log_softmax(-1)
    return kl_of_rows(logits.log_softmax(-1), truth) + kl_of_rows(log_rest, rest)
