"""The tokens of chunks that each KV head of a row keeps between choices.

State: tokens [B, Hkv, M] int64, of which the first ``counts`` [B, Hkv] count; chosen_at [B] int64 on the
host, the number of positions up to the query that chose them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..boundaries import chunk_numbers, chunk_sums, within
from ..budget import budget_at, select_topk
from ..keys import Keys, State
from ..ops.scores import scores
from ..selection import TokenIndex
from ..softmax import Softmax
from .adapters import ChunkEnds, CompressedKeys


@dataclass(frozen=True, kw_only=True)
class ChosenChunks:
    """How a layer's sets are chosen.

    compressed, ends: the summaries of the layer. k or fraction: tokens of a set, or their share of the keys
    that the row sees. longest: no chunk has more tokens, and a set is chosen anew after as many. sinks: first
    tokens of a row that are always in its set.
    """

    compressed: CompressedKeys
    ends: ChunkEnds
    k: int | None
    fraction: float | None
    longest: int
    sinks: int

    def covers(self, keys: Keys) -> bool:
        """Whether the budget covers every key of every row."""
        return self.k is not None and keys.longest() <= self.k

    def decode(self, q: Tensor, keys: Keys) -> TokenIndex:
        """What the queries q [B, H, Tq, D] of a decode call read. Sets are chosen by queries whose token ends
        a chunk. A query of a row without a set reads everything and chooses."""
        ended = self.ends.of(keys.inputs.early_hidden_states).cpu()  # [B, Tq]
        found, full = [], []
        for t in range(keys.tq):
            length = keys.past + t + 1
            full.append(self._without_set(keys, length))
            at = keys.state.get("chosen_at", torch.full((len(ended),), -self.longest))
            due = ended[:, t] | full[-1] | (length - at >= self.longest)
            if bool(due.any()):
                self.choose(q[:, :, t : t + 1], keys, length, due)
            found.append(_with_tokens_since(keys.state, length))
        width = max(tokens.shape[2] for tokens, _ in found)
        tokens, counted = (
            torch.stack([pad(x, (0, width - x.shape[2])) for x in part], 2)
            for part in zip(*found, strict=True)
        )
        whole = torch.stack(full, 1)[:, None].expand(tokens.shape[:3])  # [B, Hkv, Tq]
        every = whole.to(q.device) if bool(whole.any()) else None
        return TokenIndex.ragged(tokens, counted, full=every)

    def choose(self, q: Tensor, keys: Keys, length: int, due: Tensor) -> None:
        """Choose the sets of the rows in ``due`` [B] (bool, on the host) anew, by the queries q [B, H, 1, D]
        at position length - 1: the tokens of the chunks with the highest product of compressed query and mean
        compressed key, from the highest chunk on.

        A chunk that fits in part is taken from its beginning on. The last chunk and the first ``sinks``
        tokens of a row are always in its set, also beyond the budget.
        """
        here, peers, start = keys.held(length), keys.peers, keys.start
        k = keys.summary(self.compressed)[:, :, :here]  # [B, Hkv, N, dim]
        labels = keys.summary(self.ends)[:, 0, :here, 0]
        labels = labels if peers is None else peers.gather(labels, length)  # [B, T]
        place, held = torch.arange(length, device=q.device), keys.places()[:here]
        first = torch.zeros_like(place[:1]) if start is None else start
        visible = (place >= first[:, None]).expand(labels.shape)  # [B, T]
        numbers = chunk_numbers(within(labels.bool(), self.longest, start))
        count = int(numbers.max()) + 1
        query = self.compressed.adapters.queries(q).to(k.dtype)
        logits = scores(query, k, Softmax(keys.softmax.scale))[:, :, 0, 0]
        logits = logits.masked_fill(~visible[:, None, held], 0)  # [B, Hkv, N]
        sums = chunk_sums(logits, numbers[:, None, held], count)  # [B, Hkv, C]
        sums = sums if peers is None else peers.sum(sums)
        lengths = chunk_sums(visible.to(sums.dtype), numbers, count).clamp(min=1)
        ranked = (sums / lengths[:, None]).gather(2, numbers[:, None].expand(-1, sums.shape[1], -1))
        forced = visible & ((numbers == numbers[:, -1:]) | (place < first[:, None] + self.sinks))
        ranked = ranked.masked_fill(forced[:, None], torch.inf).masked_fill(~visible[:, None], -torch.inf)
        begins = keys.starts or [0] * len(due)
        sizes = [budget_at(self.k, self.fraction, length - begin) for begin in begins]
        wanted = torch.maximum(torch.tensor(sizes, device=q.device), forced.sum(1))[:, None]
        most = min(length, max(*sizes, self.longest + self.sinks))
        tokens, counts = select_topk(ranked, wanted.expand(ranked.shape[:2]), most)
        assert counts is not None
        _replace(keys.state, tokens, counts, length, due)

    def _without_set(self, keys: Keys, length: int) -> Tensor:
        """[B] bool: the rows that have no set yet at position length - 1, since a crop or because the budget
        has covered all their keys so far."""
        starts = keys.starts or [0] * keys.kv.batch
        covered = [self.k is not None and length - 1 - first <= self.k for first in starts]
        return torch.tensor(covered) | (not keys.state)


def _replace(state: State, tokens: Tensor, counts: Tensor, length: int, due: Tensor) -> None:
    """Make ``tokens`` [B, Hkv, M], of which ``counts`` [B, Hkv] count, the sets of the rows in ``due``
    [B]."""
    at = torch.full_like(due, length, dtype=torch.long)
    if state and not bool(due.all()):
        room = max(tokens.shape[2], state["tokens"].shape[2])
        old, tokens = (pad(x, (0, room - x.shape[2])) for x in (state["tokens"], tokens))
        rows = due.to(tokens.device)
        tokens = torch.where(rows[:, None, None], tokens, old)
        counts = torch.where(rows[:, None], counts, state["counts"])
        at = torch.where(due, at, state["chosen_at"])
    state.update(tokens=tokens, counts=counts, chosen_at=at)


def _with_tokens_since(state: State, length: int) -> tuple[Tensor, Tensor]:
    """The sets and every token since they were chosen, up to position length - 1: tokens [B, Hkv, M] and
    which of them count."""
    tokens, counts, at = (state[name] for name in ("tokens", "counts", "chosen_at"))
    since = (torch.arange(length - int(at.min())) + at[:, None]).to(tokens.device)  # [B, n]
    since = since[:, None].expand(-1, tokens.shape[1], -1)
    counted = torch.arange(tokens.shape[2], device=tokens.device) < counts[..., None]
    counted = torch.cat([counted, since < length], 2)
    return torch.cat([tokens, since.clamp(max=length - 1)], 2), counted
