"""The tokens of chunks that each KV head of a row keeps between choices.

State: tokens [B, Hkv, M] int64, of which the first ``counts`` [B, Hkv] count; chosen_at [B] int64 on the host,
the number of positions up to the query that chose them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..boundaries import chunk_numbers, chunk_sums, within
from ..budget import select_topk
from ..keys import Keys
from ..ops.scores import scores
from ..softmax import Softmax


def best_chunks(
    q: Tensor,
    keys: Keys,
    compressed: Tensor,
    ends: Tensor,
    *,
    size: Tensor,
    most: int,
    longest: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """The tokens of the chunks with the highest q . mean(k), among the first T positions.

    q [B, Hkv, 1, dim] are compressed queries at position T - 1, ``compressed`` [B, Hkv, N, dim] the compressed
    keys that are here, ends [B, T] (bool) the tokens that end a chunk. size [B]: tokens in all, at most
    ``most``; a chunk that fits in part is taken from its beginning on. The last chunk and the first ``sinks``
    tokens of a row are always taken. longest: no chunk has more tokens.
    -> tokens [B, Hkv, M] int64, ascending, and counts [B, Hkv] int32.
    """
    length, here = ends.shape[1], compressed.shape[2]
    place = torch.arange(length, device=q.device)
    first = torch.zeros(1, device=q.device, dtype=torch.long) if keys.start is None else keys.start
    visible = place >= first[:, None]  # [B or 1, T]
    numbers = chunk_numbers(within(ends, longest, keys.start))
    numbers = numbers.masked_fill(~visible, 0) if keys.start is not None else numbers
    count = int(numbers.max()) + 1
    held = keys.places()[:here]
    logits = scores(q, compressed, Softmax(keys.softmax.scale))[:, :, 0, 0]  # [B, Hkv, N]
    logits = logits.masked_fill(~visible[:, None, held], 0)
    sums = chunk_sums(logits, numbers[:, None, held], count)  # [B, Hkv, C]
    if keys.peers is not None:
        sums = keys.peers.sum(sums)
    lengths = chunk_sums(visible.expand(numbers.shape).to(sums.dtype), numbers, count).clamp(min=1)
    ranked = (sums / lengths[:, None]).gather(2, numbers[:, None].expand(-1, sums.shape[1], -1))
    forced = (numbers == numbers[:, -1:]) | (place < first[:, None] + sinks)
    forced &= visible
    ranked = ranked.masked_fill(forced[:, None], torch.inf).masked_fill(~visible[:, None], -torch.inf)
    size = torch.maximum(size.to(q.device), forced.sum(1))[:, None].expand(ranked.shape[:2])
    tokens, counts = select_topk(ranked, size, min(length, max(most, longest + sinks)))
    assert counts is not None
    return tokens, counts


def replace_chosen(keys: Keys, tokens: Tensor, counts: Tensor, length: int, due: Tensor) -> None:
    """Make ``tokens`` [B, Hkv, M], of which ``counts`` [B, Hkv] count, the sets of the rows in ``due`` [B]
    (bool, on the host), chosen by the query at position length - 1."""
    state, at = keys.state, torch.full_like(due, length, dtype=torch.long)
    if state and not bool(due.all()):
        room = max(tokens.shape[2], state["tokens"].shape[2])
        old, tokens = (pad(x, (0, room - x.shape[2])) for x in (state["tokens"], tokens))
        rows = due.to(tokens.device)
        tokens = torch.where(rows[:, None, None], tokens, old)
        counts = torch.where(rows[:, None], counts, state["counts"])
        at = torch.where(due, at, state["chosen_at"])
    state.update(tokens=tokens, counts=counts, chosen_at=at)


def with_tokens_since(keys: Keys, length: int) -> tuple[Tensor, Tensor]:
    """The sets and every token since they were chosen, up to position length - 1: tokens [B, Hkv, M] and which
    of them count."""
    tokens, counts, at = (keys.state[name] for name in ("tokens", "counts", "chosen_at"))
    since = (torch.arange(length - int(at.min())) + at[:, None]).to(tokens.device)  # [B, n]
    since = since[:, None].expand(-1, tokens.shape[1], -1)
    counted = torch.arange(tokens.shape[2], device=tokens.device) < counts[..., None]
    counted = torch.cat([counted, since < length], 2)
    return torch.cat([tokens, since.clamp(max=length - 1)], 2), counted
