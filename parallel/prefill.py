"""Prefill whose tokens are shared out over ranks: dense by the mechanism that sends least, selective by
moving what was selected."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention.attend import PREFILL_TILE, Reads, attend, count_reads, run_prefill
from ..attention.dense import Dense
from ..attention.index import Index, Window, causal_pairs
from ..attention.keys import Keys, State
from ..attention.method import PREFILL, AttentionMethod
from ..attention.partial import Partial, empty_partial
from ..attention.summary import Summaries, Summary
from .autograd import gather as gather_with_gradient
from .gather import fetch, gather_all, gather_rows, needed
from .layout import Layout, Span, Split, usp_split, zigzag
from .mesh import Mesh
from .pass_q import pass_q
from .ring import ring
from .ulysses import ulysses
from .usp import usp
from .volume import Geometry, choose, refusals

_DENSE = Dense()


class Call(NamedTuple):
    """What the layers of one forward call share.

    split: how its new tokens are shared out, or None where every rank computes all of them. past, total:
    positions before the call and after it. start, starts: each row's first valid position, on the device and
    on the host. memory: bytes that every rank can spare for one layer's attention; None: nobody has looked.
    """

    split: Split | None
    past: int
    total: int
    start: Tensor | None = None
    starts: list[int] | None = None
    memory: int | None = None


class Rows(NamedTuple):
    """Keys and values [B, Hkv, n, D] that this rank holds, and whose positions they are."""

    k: Tensor
    v: Tensor
    layout: Layout

    def before(self, position: int, rank: int) -> Rows:
        """Those of earlier positions than ``position``."""
        n = self.layout.below(rank, position)
        return Rows(self.k[:, :, :n], self.v[:, :, :n], self.layout.cut(0, position))


@dataclass
class Travel:
    """How one layer call moved data. mechanism: its name, and why it; sent: bytes that this rank sent;
    dense_bytes: what the least of the mechanisms for dense attention sends by its formula."""

    mechanism: str
    why: str = ""
    sent: int = 0
    dense_bytes: int = 0


def make_split(mesh: Mesh, past: int, total: int, granule: int) -> Split:
    """How the tokens past .. total - 1 are shared out over the ranks of ``mesh``."""
    if mesh.config.mechanism == "usp" and mesh.ulysses is not None and mesh.ring is not None:
        return usp_split(past, total, mesh.ulysses.size, mesh.ring.size, granule)
    return zigzag(past, total, mesh.ranks.size, granule)


def prefill(
    method: AttentionMethod,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    shared: Summaries,
    call: Call,
    mesh: Mesh,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Partial, Reads, Travel]:
    """Attention of this rank's queries q [B, H, split.rows, D] over the keys of all ranks.

    k, v [B, Hkv, split.rows, D]: what it has computed beside them; rows: everything it holds, those included;
    shared: the entries of the summaries that ``method`` declares, of all keys. window: the model's own,
    instead of the method. Reads counts what this rank's queries read.
    """
    assert call.split is not None
    how: dict[str, Any] = {"scale": scale, "softcap": softcap}
    selective = window is not None or (PREFILL in method.phases and method.name != _DENSE.name)
    before = mesh.sent()
    geometry = Geometry(q.shape[1], k.shape[1], (k.shape[3] + v.shape[3]) // 2, k.element_size())
    if selective and window is None and mesh.config.mechanism == "ulysses":
        part, reads, travel = _over_heads(method, q, k, v, rows, call, mesh, geometry, how)
    elif selective:
        part, reads = _selected(method, q, k, v, rows, shared, call, mesh, window, how)
        travel = Travel("fetch", "only keys that some query of the rank selected are moved")
    else:
        part, reads, travel = _dense(q, k, v, rows, call, mesh, geometry, how)
    travel.sent = mesh.sent() - before
    travel.dense_bytes = _all_gather_bytes(geometry, call, rows.layout, q.shape[0])
    return part, reads, travel


# --- dense -------------------------------------------------------------------------------------------------


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    call: Call,
    mesh: Mesh,
    geometry: Geometry,
    how: dict[str, Any],
) -> tuple[Partial, Reads, Travel]:
    split, ranks = call.split, mesh.ranks
    assert split is not None
    past = rows.before(call.past, ranks.rank)
    travel = _choice(mesh, geometry, call, past, q.shape[0])
    stored: dict[str, Any] = {"past": past.layout, "past_k": past.k, "past_v": past.v}
    if travel.mechanism == "ulysses":
        return _over_heads(_DENSE, q, k, v, rows, call, mesh, geometry, how)
    if travel.mechanism == "gather":
        keys, values = gather_all(k, v, past.k, past.v, past.layout, split, ranks)
        result = _Result(q, v.shape[3])
        result.hang_on(keys, values)
        for slot, (a, b) in split.slots(ranks.rank):
            seen = Keys(
                k=keys[:, :, :b], v=values[:, :, :b], tq=b - a, start=call.start, starts=call.starts, **how
            )
            result.put(slice(None), slot, run_prefill(_DENSE, q[:, :, slot], seen, None))
        return result.part, result.reads, travel
    at_places: dict[str, Any] = {"starts": call.starts, **how, **stored}
    if travel.mechanism == "usp":
        assert mesh.ulysses is not None and mesh.ring is not None
        out, lse = usp(
            q, k, v, split, mesh.ulysses, mesh.ring, with_lse=True, backend=mesh.config.backend, **at_places
        )
        assert lse is not None
        part = Partial(out, lse)
    else:
        part = {"ring": ring, "pass_q": pass_q}[travel.mechanism](q, k, v, split, ranks, **at_places)
    return part, _dense_reads(q, k, v, call, ranks.rank), travel


def _dense_reads(q: Tensor, k: Tensor, v: Tensor, call: Call, rank: int) -> Reads:
    assert call.split is not None
    b, h = q.shape[:2]
    pairs = sum(causal_pairs(e - a, e, call.starts, b) for _, (a, e) in call.split.slots(rank)) * h
    return count_reads(q, k, v, pairs, pairs, PREFILL_TILE * (h // k.shape[1]))


def _all_gather_bytes(geometry: Geometry, call: Call, layout: Layout, batch: int) -> int:
    """(P - 1) / P * S * 2 Hkv D e, with S filled up to what every rank sends."""
    assert call.split is not None
    stored = max(layout.cut(0, call.past).count(rank) for rank in range(layout.size))
    return batch * (layout.size - 1) * (call.split.rows + stored) * geometry.kv


def _choice(mesh: Mesh, geometry: Geometry, call: Call, past: Rows, batch: int) -> Travel:
    """The mechanism that was asked for, where it can serve these heads, else the one that ``auto`` takes."""
    assert call.split is not None
    asked, new = mesh.config.mechanism, call.total - call.past
    most = max(past.layout.count(rank) for rank in range(past.layout.size))
    u = mesh.ulysses.size if mesh.ulysses is not None else None
    if asked != "auto":
        refused = refusals(geometry, mesh.ranks.size, call.past, u)
        if asked not in refused:
            return Travel(asked, "asked for")
        return Travel("gather", f"{asked} was asked for, but {refused[asked]}")
    return Travel(*_chosen(geometry, mesh.ranks.size, new, call.past, most, call.memory, batch))


@lru_cache(maxsize=256)
def _chosen(
    geometry: Geometry, ranks: int, new: int, past: int, past_rows: int, memory: int | None, batch: int
) -> tuple[str, str]:
    choice = choose(geometry, ranks, new, past, past_rows=past_rows, memory=memory, batch=batch)
    return choice.mechanism, choice.reason


def _over_heads(
    method: AttentionMethod,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    call: Call,
    mesh: Mesh,
    geometry: Geometry,
    how: dict[str, Any],
) -> tuple[Partial, Reads, Travel]:
    """Ulysses: any method runs as on one device, on this rank's heads."""
    assert call.split is not None
    past = rows.before(call.past, mesh.ranks.rank)
    counted: list[Reads] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> Partial:
        seen = Keys(k=k, v=v, tq=q.shape[2], start=call.start, starts=call.starts, **how)
        part, reads = attend(method, PREFILL, q, seen)
        counted.append(reads)
        return part

    out, lse = ulysses(
        q,
        k,
        v,
        call.split,
        mesh.ranks,
        run,
        past=past.layout,
        past_k=past.k,
        past_v=past.v,
        with_lse=True,
        backend=mesh.config.backend,
    )
    assert lse is not None
    asked = "asked for" if mesh.config.mechanism == "ulysses" else ""
    if not asked:
        asked = _choice(mesh, geometry, call, past, q.shape[0]).why
    return Partial(out, lse), counted[0], Travel("ulysses", asked)


# --- selective ---------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _ChunkKeys(Keys):
    """The keys that one chunk of queries may see, of ``rows`` of the batch: methods select by the shared
    entries, while the keys are still elsewhere, unless they are ``complete``."""

    shared: Summaries
    rows: slice
    complete: bool

    def summary(self, summary: Summary) -> Tensor:
        entries = self.shared.room(summary, self.k, 0)[self.rows, :, : -(-self.length // summary.block)]
        self.summary_bytes += entries.numel() * entries.element_size()
        return entries

    def read_all_keys(self) -> Tensor:
        assert self.complete, "a method that reads raw keys in prefill says reads_keys"
        return super().read_all_keys()


@dataclass
class _Result:
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
        part, reads = given
        self.part.out[batch, :, slot] = part.out.to(self.part.out.dtype)
        self.part.lse[batch, :, slot] = part.lse
        for name in ("pairs", "causal_pairs", "kv_bytes", "dense_bytes", "selection_bytes"):
            setattr(self.reads, name, getattr(self.reads, name) + getattr(reads, name))
        self._reasons.append(reads.reason)
        self.reads.reason = self._reasons[0] if all(self._reasons) else None


class _Piece(NamedTuple):
    """A chunk's queries in some rows of the batch. ``cut``: which of them belong to the chunk; the others
    complete the query blocks at its ends. chosen: what they read."""

    batch: slice
    slot: slice
    cut: slice
    q: Tensor
    keys: _ChunkKeys
    chosen: Index


def _selected(
    method: AttentionMethod,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    shared: Summaries,
    call: Call,
    mesh: Mesh,
    window: int | None,
    how: dict[str, Any],
) -> tuple[Partial, Reads]:
    split, ranks = call.split, mesh.ranks
    assert split is not None
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    whole = learns or (method.reads_keys and window is None)
    if whole:
        past = rows.before(call.past, ranks.rank)
        whole_k, whole_v = gather_all(k, v, past.k, past.v, past.layout, split, ranks)
    else:
        whole_k = k.new_empty(*k.shape[:2], call.total, k.shape[3])
        whole_v = v.new_empty(*v.shape[:2], call.total, v.shape[3])
    edges = _Edges(q, call, 1 if window is not None else method.granule, mesh)
    pieces = _pieces(method, q, whole_k, whole_v, shared, call, mesh, window, edges, how)
    if not whole:
        wanted = torch.zeros(*k.shape[:2], call.total, dtype=torch.bool, device=k.device)
        for piece in pieces:
            first, keys = 0 if call.starts is None else call.starts[piece.batch.start], piece.keys
            chunk = (first + keys.past, first + keys.length)
            marks = needed(piece.chosen, chunk, [first] * keys.k.shape[0], k.shape[1], k.device)
            wanted[piece.batch, :, : chunk[1]] |= marks
        fetch(wanted, rows.k, rows.v, rows.layout, whole_k, whole_v, ranks)
    result = _Result(q, v.shape[3])
    if learns:
        result.hang_on(whole_k, whole_v, *edges.gathered)
    for piece in pieces:
        part, reads = run_prefill(method, piece.q, piece.keys, piece.chosen)
        own = Partial(part.out[:, :, piece.cut], part.lse[:, :, piece.cut])
        result.put(piece.batch, piece.slot, (own, reads))
    return result.part, result.reads


def _pieces(
    method: AttentionMethod,
    q: Tensor,
    whole_k: Tensor,
    whole_v: Tensor,
    shared: Summaries,
    call: Call,
    mesh: Mesh,
    window: int | None,
    edges: _Edges,
    how: dict[str, Any],
) -> list[_Piece]:
    """This rank's chunks, a padded batch row by row, each with what the method selects for it."""
    split, rank = call.split, mesh.ranks.rank
    assert split is not None
    complete = method.reads_keys and window is None
    everyone = [(0, slice(0, q.shape[0]))]
    alone = [(first, slice(b, b + 1)) for b, first in enumerate(call.starts or ())]
    found: dict[int, State] = {}
    if window is None and (n := min(method.last_queries, call.total - call.past)):
        last = _last_queries(q, n, split, mesh)
        for first, batch in alone or everyone:
            queries = last[batch, :, -(call.total - max(first, call.past)) :]
            k, v = whole_k[batch, :, first:], whole_v[batch, :, first:]
            tq = queries.shape[2]
            keys = _ChunkKeys(k=k, v=v, tq=tq, shared=shared, rows=batch, complete=complete, **how)
            found[batch.start] = method.survey(queries, keys)
    pieces = []
    for slot, (a, b) in split.slots(rank):
        for first, batch in alone or everyone:
            begin = max(a, first)
            if begin >= b:
                continue
            low, high = edges.reach((begin, b), first)
            queries = edges.widened(
                q[batch, :, slot.stop - (b - begin) : slot.stop], (begin, b), low, high, batch
            )
            end = b + high
            keys = _ChunkKeys(
                k=whole_k[batch, :, first:end],
                v=whole_v[batch, :, first:end],
                tq=queries.shape[2],
                shared=shared,
                rows=batch,
                complete=complete,
                surveyed=found.get(batch.start, {}),
                **how,
            )
            if window is not None:
                index: Index = Window(size=window)
            else:
                index = method.select_prefill(queries, keys)
            here = slice(slot.stop - (b - begin), slot.stop)
            pieces.append(_Piece(batch, here, slice(low, low + b - begin), queries, keys, index))
    return pieces


def _last_queries(q: Tensor, n: int, split: Split, mesh: Mesh) -> Tensor:
    """The last n queries [B, H, n, D] of the call, on every rank."""
    layout, rank = split.layout(), mesh.ranks.rank
    first = layout.below(rank, split.end - n)
    mine = split.real(q, rank).detach()[:, :, first:]
    return gather_rows(mine, layout.cut(split.end - n, split.end), mesh.ranks, "last_queries")


class _Edges:
    """Queries beyond a chunk's ends, for query blocks that a chunk cuts: blocks count from a row's own start.

    Every chunk's first and last granule - 1 queries go to all ranks, and only where some block is cut.
    """

    def __init__(self, q: Tensor, call: Call, granule: int, mesh: Mesh) -> None:
        split = call.split
        assert split is not None
        self.split, self.granule, self.past = split, granule, call.past
        self.gathered: list[Tensor] = []
        self._before: dict[int, Tensor] = {}  # by position, the last queries before it
        self._after: dict[int, Tensor] = {}  # by position, the first ones from it on
        chunks = [chunk for spans in split.chunks for chunk in spans if chunk[0] < chunk[1]]
        if not any(
            self.reach(c, first) != (0, 0) for first in call.starts or () for c in chunks if c[1] > first
        ):
            return
        reach = min(granule - 1, split.width)
        ends = []
        for i, (a, b) in enumerate(split.chunks[mesh.ranks.rank]):
            at, size = i * split.width, max(b - a, reach)
            ends.append(torch.stack([q[:, :, at : at + reach], q[:, :, at + size - reach : at + size]]))
        every = gather_with_gradient(torch.stack(ends), mesh.ranks, "edges")  # [P, chunks, 2, B, H, reach, D]
        self.gathered.append(every)
        for rank, spans in enumerate(split.chunks):
            for i, (a, b) in enumerate(spans):
                if a < b:
                    size = min(reach, b - a)
                    self._after[a] = every[rank, i, 0][:, :, :size]
                    self._before[b] = (
                        every[rank, i, 1][:, :, reach - size :] if b - a >= reach else self._after[a]
                    )

    def reach(self, chunk: Span, first: int) -> tuple[int, int]:
        """How many queries before and after the chunk its query blocks take in, in a row that begins at
        ``first``."""
        if first <= self.past:  # blocks count from the call's first query, as chunks do
            return 0, 0
        begin, end = max(chunk[0], first), chunk[1]
        return (begin - first) % self.granule, min(-(end - first) % self.granule, self.split.end - end)

    def widened(self, q: Tensor, chunk: Span, low: int, high: int, batch: slice) -> Tensor:
        """q [B, H, n, D] of the chunk with ``low`` queries before and ``high`` after it."""
        parts = [q]
        if low:
            parts.insert(0, self._before[chunk[0]][batch, :, -low:])
        if high:
            parts.append(self._after[chunk[1]][batch, :, :high])
        return torch.cat(parts, 2) if len(parts) > 1 else q
