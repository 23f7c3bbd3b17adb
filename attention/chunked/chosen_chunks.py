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

    def begin(self, q: Tensor, keys: Keys) -> None:
        """Drop all sets. Choose those of the rows whose keys the budget does not cover, by the last query of
        q [B, H, n, D]."""
        _reset(keys)
        due = ~self._covered(keys, keys.length)
        if bool(due.any()):
            self.choose(q[:, :, -1:], keys, keys.length, due)

    def decode(self, q: Tensor, keys: Keys) -> TokenIndex:
        """What the queries q [B, H, Tq, D] of a decode call read. Sets are chosen by queries whose token ends
        a chunk. The first query of a row that the budget does not cover, and one of a row without a set, read
        everything and choose. A row that the budget covers reads everything and chooses nothing."""
        ended = self.ends.of(keys.inputs.early_hidden_states).cpu()  # [B, Tq]
        cropped = not keys.state
        if cropped:
            _reset(keys)
        found, full = [], []
        for t in range(keys.tq):
            length = keys.past + t + 1
            covered = self._covered(keys, length)
            without = self._covered(keys, length - 1) | (cropped and t == 0)
            at = torch.where(covered, length, keys.state["chosen_at"])
            keys.state["chosen_at"] = at
            due = ~covered & (ended[:, t] | without | (length - at >= self.longest))
            if bool(due.any()):
                self.choose(q[:, :, t : t + 1], keys, length, due)
            full.append(covered | without)
            found.append(_with_tokens_since(keys.state, length))
        width = max(tokens.shape[2] for tokens, _ in found)
        tokens, counted = (
            torch.stack([pad(x, (0, width - x.shape[2])) for x in part], 2)
            for part in zip(*found, strict=True)
        )
        whole = torch.stack(full, 1)[:, None].expand(tokens.shape[:3])  # [B, Hkv, Tq]
        return TokenIndex.ragged(tokens, counted, full=whole if bool(whole.any()) else None)

    def choose(self, q: Tensor, keys: Keys, length: int, due: Tensor) -> None:
        """Choose the sets of the rows in ``due`` [B] (bool, on the host, at least one) anew, by the queries
        q [B, H, 1, D] at position length - 1: the tokens of the chunks with the highest product of compressed
        query and mean compressed key, from the highest chunk on. Nothing of other rows is read.

        A chunk that fits in part is read from its beginning on. The chunk of the choosing query and the first
        ``sinks`` tokens of a row are always in its set, also beyond the budget.
        """
        here, peers = keys.held(length), keys.peers
        rows = None if bool(due.all()) else due.nonzero()[:, 0].to(q.device)
        k = keys.summary(self.compressed, rows=rows)[:, :, :here]  # [B, Hkv, N, dim], B: the rows in due
        labels = keys.summary(self.ends, rows=rows)[:, 0, :here, 0]
        if rows is not None:
            q = q[rows]
        start = keys.start if keys.start is None or rows is None else keys.start[rows]
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
        begins = zip(keys.starts or [0] * len(due), due.tolist(), strict=True)
        sizes = [budget_at(self.k, self.fraction, length - begin) for begin, chooses in begins if chooses]
        wanted = torch.maximum(torch.tensor(sizes, device=q.device), forced.sum(1))[:, None]
        most = min(length, max(*sizes, self.longest + self.sinks))
        tokens, counts = select_topk(ranked, wanted.expand(ranked.shape[:2]), most)
        assert counts is not None
        _replace(keys.state, tokens, counts, length, due)

    def _covered(self, keys: Keys, length: int) -> Tensor:
        """[B] bool, on the host: the rows of whose keys at the first ``length`` positions the budget covers
        all."""
        starts = keys.starts or [0] * keys.kv.batch
        return torch.tensor([self.k is not None and length - first <= self.k for first in starts])


def _reset(keys: Keys) -> None:
    """Drop all sets."""
    shape, device = (keys.kv.batch, keys.kv.num_kv_heads), keys.kv.device
    keys.state.update(
        tokens=torch.zeros(*shape, 0, dtype=torch.long, device=device),
        counts=torch.zeros(shape, dtype=torch.int, device=device),
        chosen_at=torch.full(shape[:1], keys.past),
    )


def _replace(state: State, tokens: Tensor, counts: Tensor, length: int, due: Tensor) -> None:
    """Make ``tokens`` [R, Hkv, M], of which ``counts`` [R, Hkv] count, the sets of the R rows in ``due``
    [B]."""
    if not bool(due.all()):
        room = max(tokens.shape[2], state["tokens"].shape[2])
        old, new = (pad(x, (0, room - x.shape[2])) for x in (state["tokens"], tokens))
        rows = due.nonzero()[:, 0].to(tokens.device)
        tokens = old.index_copy(0, rows, new)
        counts = state["counts"].index_copy(0, rows, counts)
    state.update(tokens=tokens, counts=counts, chosen_at=torch.where(due, length, state["chosen_at"]))


def _with_tokens_since(state: State, length: int) -> tuple[Tensor, Tensor]:
    """The sets and every token since they were chosen, up to position length - 1: tokens [B, Hkv, M] and
    which of them count."""
    tokens, counts, at = (state[name] for name in ("tokens", "counts", "chosen_at"))
    since = (torch.arange(length - int(at.min())) + at[:, None]).to(tokens.device)  # [B, n]
    since = since[:, None].expand(-1, tokens.shape[1], -1)
    counted = torch.arange(tokens.shape[2], device=tokens.device) < counts[..., None]
    counted = torch.cat([counted, since < length], 2)
    return torch.cat([tokens, since.clamp(max=length - 1)], 2), counted
