"""Selective prefill over ranks. Every rank selects for its own queries as one device does, by the shared
summaries. Then only the keys that a rank has selected move to it.

While a layer runs, a rank has memory for the keys of all positions; only those that it reads are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...attention.attend import Reads, run_prefill
from ...attention.errors import FarspanError
from ...attention.keys import Keys, State
from ...attention.kv import KV
from ...attention.method import PREFILL, AttentionMethod
from ...attention.partial import Partial, empty_partial
from ...attention.selection import Selection, Summarised, Window, as_selection
from ...attention.summary import Summaries, Summary
from .call import Call, LocalCall
from .edges import Beyond, beyond
from .entries import last_positions
from .gather import fetch, gather_all
from .layout import Span

Own = Mapping[str, Tensor]  # of ``Inputs.own``
_QUERIES = "queries"  # those that attend, beside the names of ``Inputs.own``


@dataclass(kw_only=True)
class _ChunkKeys(Keys):
    """The keys that one chunk of queries may read, for ``rows`` of the batch, which begin at position
    ``first``. Methods select by the entries of ``shared`` and by ``labels`` before the keys have arrived.
    complete: all keys have arrived."""

    shared: Summaries
    labels: Mapping[tuple, Tensor]
    rows: slice
    first: int
    complete: bool

    def entries(self, summary: Summary) -> Tensor:
        if summary.block is None:
            return self.labels[summary.key][self.rows, :, self.first : self.first + self.length]
        return self.shared.entries(summary, self.length)[self.rows]

    def read_all_keys(self) -> Tensor:
        assert self.complete, "a method that reads raw keys in prefill declares needs.keys"
        return super().read_all_keys()


@dataclass
class Result:
    """The output of a rank's rows, written piece by piece; padding and split padding stay (0, -inf)."""

    q: Tensor
    value_dim: int
    reads: Reads = field(default_factory=Reads)

    def __post_init__(self) -> None:
        self.part = empty_partial(self.q, self.value_dim)
        self._reasons: list[str | None] = []

    def keep_in_graph(self, *gathered: Tensor) -> None:
        """Make the output depend on the queries and on what other ranks have sent. A rank that has only split
        padding would otherwise compute no gradients, and the others would wait for it in backward."""
        zero = sum((x[..., :0].sum() for x in (self.q, *gathered)), torch.zeros((), device=self.q.device))
        if zero.requires_grad:
            self.part = Partial(self.part.out + zero, self.part.lse)

    def write(self, batch: slice, slot: slice, piece: tuple[Partial, Reads]) -> None:
        """Set the queries ``slot`` of the rows ``batch``, and count what they have read."""
        part, reads = piece
        self.part.out[batch, :, slot] = part.out.to(self.part.out.dtype)
        self.part.lse[batch, :, slot] = part.lse
        self.reads += reads
        self._reasons.append(reads.reason)
        self.reads.reason = self._reasons[0] if all(self._reasons) else None


class _Piece(NamedTuple):
    """The queries of a chunk in some rows of the batch. cut: which of ``q`` belong to the chunk; the others
    complete the query blocks at its ends. selection: the keys that they read."""

    batch: slice
    slot: slice
    cut: range
    q: Tensor
    keys: _ChunkKeys
    selection: Selection


def selected(
    method: AttentionMethod, local: LocalCall, shared: Summaries, window: int | None
) -> tuple[Partial, Reads]:
    """Attention of this rank's queries over the keys that ``method``, or the model's own ``window``, selects
    for them. shared: the entries, for all keys, of the method's summaries."""
    q, k, v, call, ranks = local.q, local.k, local.v, local.call, local.mesh.ranks
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    whole = has_gradient or (method.needs.keys and window is None)
    if whole:
        past = local.past
        keys, values = gather_all(k, v, *past.kv.dense(), past.layout, local.split, ranks)
    else:
        keys = k.new_empty(*k.shape[:2], call.total, k.shape[3])
        values = v.new_empty(*v.shape[:2], call.total, v.shape[3])
    edges = _Edges(local, None if window is not None else method)
    pieces, prepare_bytes = _pieces(method, local, keys, values, shared, window, edges)
    if has_gradient and any(isinstance(piece.selection, Summarised) for piece in pieces):
        raise FarspanError(
            f"Over ranks, the summaries that {method.name} reads have no gradient: train it with data "
            "parallelism instead, or call the model under torch.no_grad()."
        )
    if not whole:
        wanted = torch.zeros(*k.shape[:2], call.total, dtype=torch.bool, device=k.device)
        for piece in pieces:
            first = _first(call, piece.batch)
            chunk = (first + piece.keys.past, first + piece.keys.length)
            rows = [first] * piece.keys.kv.batch
            wanted[piece.batch, :, : chunk[1]] |= piece.selection.needed(chunk, rows, k.shape[1], k.device)
        fetch(wanted, *local.shard.kv.dense(), local.shard.layout, keys, values, ranks)
    result = Result(q, v.shape[3])
    result.reads.selection_bytes = prepare_bytes
    if has_gradient:
        result.keep_in_graph(keys, values, *edges.arrived)
    for piece in pieces:
        part, reads = run_prefill(method, piece.q, piece.keys, piece.selection, rows=piece.cut)
        cut = slice(piece.cut.start, piece.cut.stop)
        own = Partial(part.out[:, :, cut], part.lse[:, :, cut])
        result.write(piece.batch, piece.slot, (own, reads))
    return result.part, result.reads


def _first(call: Call, batch: slice) -> int:
    """The first valid position of the row, or of all rows, of ``batch``."""
    return 0 if call.starts is None else call.starts[batch.start]


def _pieces(
    method: AttentionMethod,
    local: LocalCall,
    keys: Tensor,
    values: Tensor,
    shared: Summaries,
    window: int | None,
    edges: _Edges,
) -> tuple[list[_Piece], int]:
    """This rank's chunks, a padded batch row by row, each with what the method selects for it; and the bytes
    that ``prepare_prefill`` has read."""
    q, call = local.q, local.call
    complete = method.needs.keys and window is None
    batches = [slice(0, q.shape[0])]
    if call.starts is not None:
        batches = [slice(b, b + 1) for b in range(q.shape[0])]

    def view(batch: slice, end: int, tq: int, found: State, own: Own) -> _ChunkKeys:
        first = _first(call, batch)
        return _ChunkKeys(
            kv=KV(keys[batch, :, first:end], values[batch, :, first:end]),
            tq=tq,
            shared=shared,
            labels=local.labels,
            rows=batch,
            first=first,
            evicted=None if call.evicted is None else call.evicted[batch],
            complete=complete,
            prepared=found,
            softmax=local.softmax,
            fed=local.fed.of(own, end - first) if local.fed is not None and own else None,
        )

    prepared: dict[int, State] = {}
    prepare_bytes = 0
    if window is None and (n := min(method.last_queries, call.total - call.past)):
        last, fed = last_queries(local, n), last_inputs(local, n)
        for batch in batches:
            valid = min(n, call.total - max(_first(call, batch), call.past))
            own = {name: x[batch, :, n - valid :] for name, x in fed.items()}
            whole = view(batch, call.total, valid, {}, own)
            prepared[batch.start] = method.prepare_prefill(last[batch, :, n - valid :], whole)
            prepare_bytes += whole.summary_bytes
    pieces = []
    for slot, (a, b) in local.split.slots(local.rank):
        for batch in batches:
            first = _first(call, batch)
            begin = max(a, first)
            if begin >= b:
                continue
            here = slice(slot.stop - (b - begin), slot.stop)
            low, high = edges.reach((begin, b), first)
            own = edges.extended(here, (a, b), low, high, batch)
            queries = own.pop(_QUERIES)
            visible = view(batch, b + high, queries.shape[2], prepared.get(batch.start, {}), own)
            if window is not None:
                selection: Selection = Window(size=window)
            else:
                selection = as_selection(method.select_prefill(queries, visible), PREFILL)
            pieces.append(_Piece(batch, here, range(low, low + b - begin), queries, visible, selection))
    return pieces, prepare_bytes


def last_queries(local: LocalCall, n: int) -> Tensor:
    """The last n queries [B, H, n, D] of the call, on every rank."""
    return last_positions(local.q.detach(), n, local.split, local.mesh.ranks, "last_queries")


def last_inputs(local: LocalCall, n: int) -> Own:
    """``Inputs.own`` of the last n positions of the call, on every rank; empty where no method needs any."""
    own = {} if local.fed is None else local.fed.own()
    ranks = local.mesh.ranks
    return {name: last_positions(x.detach(), n, local.split, ranks, "inputs") for name, x in own.items()}


class _Edges:
    """The queries and inputs next to a chunk, for query blocks that the end of a chunk cuts. Nothing is sent
    where no block is cut. method: whose query blocks they are; None: every query is one."""

    def __init__(self, local: LocalCall, method: AttentionMethod | None) -> None:
        self.block = 1 if method is None else method.block_multiple
        self.anchored = method is not None and method.anchored_queries
        self.past, self.end = local.call.past, local.split.end
        self.arrived: list[Tensor] = []
        self._beyond: dict[str, dict[Span, Beyond]] = {}
        self._own = {_QUERIES: local.q}
        if local.fed is not None:
            self._own |= {name: x.detach() for name, x in local.fed.own().items()}
        chunks = [chunk for rank in range(local.split.size) for _, chunk in local.split.slots(rank)]
        starts = local.call.starts or (0,)
        if any(self.reach((max(a, s), b), s) != (0, 0) for s in starts for a, b in chunks if b > s):
            n = self.block - 1
            for name, x in self._own.items():
                self._beyond[name], arrived = beyond(x, n, n, local.split, local.mesh.ranks, "edges")
                if name == _QUERIES:
                    self.arrived.append(arrived)

    def reach(self, chunk: Span, first: int) -> tuple[int, int]:
        """How many queries of the call before and after the chunk belong to its query blocks, in a row that
        begins at position ``first``."""
        if first <= self.past and not self.anchored:
            return 0, 0  # blocks count from the call's first query, as chunks do
        begin, end = chunk
        low = min((begin - first) % self.block, begin - max(first, self.past))
        return low, min(-(end - first) % self.block, self.end - end)

    def extended(self, here: slice, chunk: Span, low: int, high: int, batch: slice) -> dict[str, Tensor]:
        """The queries and inputs [B, any, n, any] of the tokens ``here`` of a chunk, with those of ``low``
        tokens before and ``high`` after it."""
        found = {}
        for name, x in self._own.items():
            parts = [x[batch, :, here]]
            if low:
                parts.insert(0, self._beyond[name][chunk].before[batch, :, -low:])
            if high:
                parts.append(self._beyond[name][chunk].after[batch, :, :high])
            found[name] = torch.cat(parts, 2) if len(parts) > 1 else parts[0]
        return found
