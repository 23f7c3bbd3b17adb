"""The tokens of chunks that each KV head of a row keeps between choices.

State: tokens [B, Hkv, M] int64, of which the first ``counts`` [B, Hkv] count; chosen_at [B] int64 on the host,
the number of positions up to the query that chose them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..boundaries import chunk_numbers, chunk_sums, within
from ..budget import select_topk
from ..keys import Keys, State
from ..ops.scores import scores
from ..softmax import Softmax
from .adapters import ChunkEnds, CompressedKeys


def choose(
    q: Tensor,
    keys: Keys,
    length: int,
    due: Tensor,
    *,
    compressed: CompressedKeys,
    ends: ChunkEnds,
    size: Callable[[int], int],
    longest: int,
    sinks: int,
) -> None:
    """Choose the sets of the rows in ``due`` [B] (bool, on the host) anew, by the queries q [B, H, 1, D] at
    position length - 1: the tokens of the chunks with the highest product of compressed query and mean
    compressed key, from the highest chunk on.

    size(n): tokens of a set of a row that sees n keys. A chunk that fits in part is taken from its beginning
    on. The last chunk and the first ``sinks`` tokens of a row are always in its set. longest: no chunk has
    more tokens.
    """
    here, peers, start = keys.held(length), keys.peers, keys.start
    k = keys.summary(compressed)[:, :, :here]  # [B, Hkv, N, dim]
    labels = keys.summary(ends)[:, 0, :here, 0]
    labels = labels if peers is None else peers.gather(labels, length)  # [B, T]
    place, held = torch.arange(length, device=q.device), keys.places()[:here]
    first = torch.zeros_like(place[:1]) if start is None else start
    visible = (place >= first[:, None]).expand(labels.shape)  # [B, T]
    numbers = chunk_numbers(within(labels.bool(), longest, start))
    count = int(numbers.max()) + 1
    logits = scores(compressed.adapters.queries(q).to(k.dtype), k, Softmax(keys.softmax.scale))[:, :, 0, 0]
    logits = logits.masked_fill(~visible[:, None, held], 0)  # [B, Hkv, N]
    sums = chunk_sums(logits, numbers[:, None, held], count)  # [B, Hkv, C]
    sums = sums if peers is None else peers.sum(sums)
    lengths = chunk_sums(visible.to(sums.dtype), numbers, count).clamp(min=1)
    ranked = (sums / lengths[:, None]).gather(2, numbers[:, None].expand(-1, sums.shape[1], -1))
    forced = visible & ((numbers == numbers[:, -1:]) | (place < first[:, None] + sinks))
    ranked = ranked.masked_fill(forced[:, None], torch.inf).masked_fill(~visible[:, None], -torch.inf)
    sizes = [size(length - begin) for begin in keys.starts or [0] * len(due)]
    wanted = torch.maximum(torch.tensor(sizes, device=q.device), forced.sum(1))[:, None]
    most = min(length, max(*sizes, longest + sinks))
    tokens, counts = select_topk(ranked, wanted.expand(ranked.shape[:2]), most)
    assert counts is not None
    _replace(keys.state, tokens, counts, length, due)


def _replace(state: State, tokens: Tensor, counts: Tensor, length: int, due: Tensor) -> None:
    """Make ``tokens`` [B, Hkv, M], of which ``counts`` [B, Hkv] count, the sets of the rows in ``due`` [B]."""
    at = torch.full_like(due, length, dtype=torch.long)
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
