"""Selective prefill over ranks: every rank selects for its own queries as one device does, by the shared
summaries, and then only what somebody selected moves.

For the time of a layer a rank has room for the keys of all positions, though it fills no more than it reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...attention.attend import Reads, run_prefill
from ...attention.index import Index, Window
from ...attention.keys import Keys, State
from ...attention.kv import KV
from ...attention.method import AttentionMethod
from ...attention.partial import Partial, empty_partial
from ...attention.summary import Summaries, Summary, count_entries
from .call import Call, Share
from .edges import Beyond, beyond
from .gather import fetch, gather_all, gather_rows, needed
from .layout import Span


@dataclass(kw_only=True)
class _ChunkKeys(Keys):
    """The keys that one chunk of queries may see, of ``rows`` of the batch: methods select by the shared
    entries, while the keys are still elsewhere, unless they are ``complete``."""

    shared: Summaries
    rows: slice
    complete: bool

    def summary(self, summary: Summary) -> Tensor:
        entries = self.shared.room(summary, self.kv, 0)[self.rows, :, : count_entries(summary, self.length)]
        self.summary_bytes += entries.numel() * entries.element_size()
        return entries

    def read_all_keys(self) -> Tensor:
        assert self.complete, "a method that reads raw keys in prefill says reads_keys"
        return super().read_all_keys()


@dataclass
class Result:
    """The output of a rank's rows, put together of pieces; filling rows and padding stay empty."""

    q: Tensor
    value_dim: int
    reads: Reads = field(default_factory=Reads)

    def __post_init__(self) -> None:
        self.part = empty_partial(self.q, self.value_dim)
        self._reasons: list[str | None] = []

    def hang_on(self, *gathered: Tensor) -> None:
        """Keep the queries and what others have sent in the graph: a rank of nothing but filling would have
        no gradients, and leave the others waiting for it in backward."""
        zero = sum((x[..., :0].sum() for x in (self.q, *gathered)), torch.zeros((), device=self.q.device))
        if zero.requires_grad:
            self.part = Partial(self.part.out + zero, self.part.lse)

    def put(self, batch: slice, slot: slice, given: tuple[Partial, Reads]) -> None:
        """Rows ``slot`` of the rows ``batch``."""
        part, reads = given
        self.part.out[batch, :, slot] = part.out.to(self.part.out.dtype)
        self.part.lse[batch, :, slot] = part.lse
        self.reads += reads
        self._reasons.append(reads.reason)
        self.reads.reason = self._reasons[0] if all(self._reasons) else None


class _Piece(NamedTuple):
    """A chunk's queries in some rows of the batch. ``cut``: which of them belong to the chunk; the others
    complete the query blocks at its ends. chosen: what they read."""

    batch: slice
    slot: slice
    cut: range
    q: Tensor
    keys: _ChunkKeys
    chosen: Index


def selected(
    method: AttentionMethod, share: Share, shared: Summaries, window: int | None
) -> tuple[Partial, Reads]:
    """Attention of this rank's queries over what ``method`` (or the model's own ``window``) selects for them;
    shared: the entries of the method's summaries, of all keys."""
    q, k, v, call, ranks = share.q, share.k, share.v, share.call, share.mesh.ranks
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    whole = learns or (method.reads_keys and window is None)
    if whole:
        past = share.past
        keys, values = gather_all(k, v, *past.kv.dense(), past.layout, share.split, ranks)
    else:
        keys = k.new_empty(*k.shape[:2], call.total, k.shape[3])
        values = v.new_empty(*v.shape[:2], call.total, v.shape[3])
    edges = _Edges(share, 1 if window is not None else method.block_multiple)
    pieces = _pieces(method, share, keys, values, shared, window, edges)
    if not whole:
        wanted = torch.zeros(*k.shape[:2], call.total, dtype=torch.bool, device=k.device)
        for piece in pieces:
            first = _first(call, piece.batch)
            chunk = (first + piece.keys.past, first + piece.keys.length)
            rows = [first] * piece.keys.kv.batch
            wanted[piece.batch, :, : chunk[1]] |= needed(piece.chosen, chunk, rows, k.shape[1], k.device)
        fetch(wanted, *share.rows.kv.dense(), share.rows.layout, keys, values, ranks)
    result = Result(q, v.shape[3])
    if learns:
        result.hang_on(keys, values, *edges.arrived)
    for piece in pieces:
        part, reads = run_prefill(method, piece.q, piece.keys, piece.chosen, rows=piece.cut)
        cut = slice(piece.cut.start, piece.cut.stop)
        own = Partial(part.out[:, :, cut], part.lse[:, :, cut])
        result.put(piece.batch, piece.slot, (own, reads))
    return result.part, result.reads


def _first(call: Call, batch: slice) -> int:
    """Where the row, or all rows, of ``batch`` begin."""
    return 0 if call.starts is None else call.starts[batch.start]


def _pieces(
    method: AttentionMethod,
    share: Share,
    keys: Tensor,
    values: Tensor,
    shared: Summaries,
    window: int | None,
    edges: _Edges,
) -> list[_Piece]:
    """This rank's chunks, a padded batch row by row, each with what the method selects for it."""
    q, call = share.q, share.call
    complete = method.reads_keys and window is None
    batches = [slice(0, q.shape[0])]
    if call.starts is not None:
        batches = [slice(b, b + 1) for b in range(q.shape[0])]

    def view(batch: slice, end: int, tq: int, found: State) -> _ChunkKeys:
        first = _first(call, batch)
        return _ChunkKeys(
            kv=KV(keys[batch, :, first:end], values[batch, :, first:end]),
            tq=tq,
            shared=shared,
            rows=batch,
            complete=complete,
            prepared=found,
            softmax=share.softmax,
        )

    prepared: dict[int, State] = {}
    if window is None and (n := min(method.last_queries, call.total - call.past)):
        last = last_queries(share, n)
        for batch in batches:
            queries = last[batch, :, -(call.total - max(_first(call, batch), call.past)) :]
            found = method.prepare_prefill(queries, view(batch, call.total, queries.shape[2], {}))
            prepared[batch.start] = found
    pieces = []
    for slot, (a, b) in share.split.slots(share.rank):
        for batch in batches:
            first = _first(call, batch)
            begin = max(a, first)
            if begin >= b:
                continue
            here = slice(slot.stop - (b - begin), slot.stop)
            low, high = edges.reach((begin, b), first)
            queries = edges.widened(q[batch, :, here], (a, b), low, high, batch)
            seen = view(batch, b + high, queries.shape[2], prepared.get(batch.start, {}))
            if window is not None:
                chosen: Index = Window(size=window)
            else:
                chosen = method.select_prefill(queries, seen)
            pieces.append(_Piece(batch, here, range(low, low + b - begin), queries, seen, chosen))
    return pieces


def last_queries(share: Share, n: int) -> Tensor:
    """The last n queries [B, H, n, D] of the call, on every rank."""
    layout, begin = share.split.layout(), share.split.end - n
    mine = share.split.real(share.q, share.rank).detach()[:, :, layout.below(share.rank, begin) :]
    return gather_rows(mine, layout.cut(begin, share.split.end), share.mesh.ranks, "last_queries")


class _Edges:
    """Queries beyond a chunk's ends, for query blocks that a chunk cuts: blocks count from a row's own start.
    Nothing travels where no block is cut."""

    def __init__(self, share: Share, block_multiple: int) -> None:
        self.block_multiple, self.past, self.end = block_multiple, share.call.past, share.split.end
        self.arrived: list[Tensor] = []
        self._beyond: dict[Span, Beyond] = {}
        chunks = [chunk for rank in range(share.split.size) for _, chunk in share.split.slots(rank)]
        starts = share.call.starts or ()
        if any(self.reach((max(a, s), b), s) != (0, 0) for s in starts for a, b in chunks if b > s):
            n = block_multiple - 1
            self._beyond, arrived = beyond(share.q, n, n, share.split, share.mesh.ranks, "edges")
            self.arrived.append(arrived)

    def reach(self, chunk: Span, first: int) -> tuple[int, int]:
        """How many queries before and after the chunk its query blocks take in, in a row that begins at
        ``first``."""
        if first <= self.past:  # blocks count from the call's first query, as chunks do
            return 0, 0
        begin, end = chunk
        return (begin - first) % self.block_multiple, min(
            -(end - first) % self.block_multiple, self.end - end
        )

    def widened(self, q: Tensor, chunk: Span, low: int, high: int, batch: slice) -> Tensor:
        """q [B, H, n, D] of the chunk with ``low`` queries before and ``high`` after it."""
        parts = [q]
        if low:
            parts.insert(0, self._beyond[chunk].before[batch, :, -low:])
        if high:
            parts.append(self._beyond[chunk].after[batch, :, :high])
        return torch.cat(parts, 2) if len(parts) > 1 else q
