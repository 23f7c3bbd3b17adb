"""Simulates the schedule of one layer on many ranks: computation, messages, and which waits for which.

Each rank has one compute engine and one outgoing link. An operation begins when its engine or link is free
and its inputs have arrived. All ranks take the same steps, so their times are arrays.

    gather    the projections, an all-gather of K and V round the ring, then attention
    ring      the shift of a block to the next rank starts before the attention over the block; both run at
              once, and the next shift waits for both (two buffers)
    ulysses   all-to-all of q, k and v, attention of the rank's heads, all-to-all of the output
    usp       the same inside each group of U ranks, with the ring over groups in place of the attention
    pass_q    an all-gather of q, attention over the rank's own keys, all-to-all of the partials
    fetch     a sliding-window layer: an all-gather of which keys each rank reads, then an all-to-all of them

Assumptions: a message takes latency + bytes / bandwidth. A link carries one message at a time, and its two
directions do not slow each other down. The network has no other users and no contention. Matrix products and
attention run at utilisation * flops, and no faster than memory delivers their operands. Ranks are equal and
start at the same time. A ring all-gather across nodes uses the network cards of the whole node, as NCCL's
channels do; a shift from one rank to the next uses one card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..mechanisms.layout import Split, contiguous, usp_split
from ..mechanisms.volume import Geometry, PrefillCall, refusals, window_volume
from .device import Device

Times = np.ndarray  # [P] float64, seconds since the layer began


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one layer.

    parameters: of the matrices that each token is multiplied with, 2 operations for each. window: the most
    keys that a query sees; None: no limit. density: the part of the visible keys that is read.
    """

    geometry: Geometry
    parameters: int = 0
    window: int | None = None
    density: float = 1.0


@dataclass(frozen=True)
class Trace:
    """The result of a simulation. seconds: until the last rank has finished. busy: seconds in which the
    busiest rank computes. sent: bytes that each rank sends."""

    seconds: float
    busy: float
    sent: int


class _Clock:
    """The times at which each rank's engine and link are free, and totals of what they have done."""

    def __init__(self, device: Device, ranks: int) -> None:
        self.device, self.ranks = device, ranks
        self.engine, self.link = np.zeros(ranks), np.zeros(ranks)
        self.busy = np.zeros(ranks)
        self.sent = 0

    def compute(self, seconds: Times | float, after: Times | float = 0.0) -> Times:
        """Run one kernel on every rank. -> [P], the time at which it ends."""
        seconds = seconds + self.device.launch
        self.busy += seconds
        self.engine = np.maximum(self.engine, after) + seconds
        return self.engine

    def shift(self, size: int, by: int, after: Times, *, collective: bool = False) -> Times:
        """Every rank sends ``size`` bytes to the rank ``by`` places later. -> [P], the time at which each has
        received. Sender and receiver must both be ready."""
        d = self.device
        here = np.arange(self.ranks)
        there = (here + by) % self.ranks
        inside = here // d.per_node == there // d.per_node
        network = d.node_bandwidth * (d.per_node if collective else 1)
        seconds = np.where(inside, d.latency + size / d.link_bandwidth, d.node_latency + size / network)
        begin = np.maximum(np.maximum(after, after[there]), self.link)
        self.link = begin + seconds
        self.sent += size
        arrived = np.empty(self.ranks)
        arrived[there] = self.link
        return arrived

    def all_gather(self, size: int, after: Times) -> Times:
        """Send ``size`` bytes of every rank to all, round the ring. -> [P], the time at which each has them
        all."""
        arrived = after + self.device.launch
        for _ in range(self.ranks - 1):
            arrived = self.shift(size, 1, arrived, collective=True)
        return arrived

    def all_to_all(self, size: int, group: int, after: Times) -> Times:
        """In each group of neighbouring ranks, send ``size`` bytes from each rank to every other one, all at
        once."""
        d = self.device
        near = min(group, d.per_node) - 1
        far = group - 1 - near
        inside = d.latency + near * size / d.link_bandwidth if near else 0.0
        outside = d.node_latency + far * size / d.node_bandwidth if far else 0.0
        begin = np.maximum(after, self.link).reshape(-1, group).max(1).repeat(group)
        self.link = begin + d.launch + max(inside, outside)
        self.sent += (group - 1) * size
        return self.link


@dataclass(frozen=True)
class _Attention:
    """The attention of one layer in one call: its sizes and seconds. ulysses: ranks of a group that exchanges
    heads, 1 where none does."""

    work: Work
    device: Device
    call: PrefillCall
    ulysses: int

    @property
    def rows(self) -> int:
        return self.call.rows

    @property
    def stored(self) -> int:
        return self.call.stored

    @property
    def batch(self) -> int:
        return self.call.batch

    @property
    def _grid(self) -> tuple[int, int, int, int, int, bool]:
        """past, new, ulysses, ring, block_multiple, in_order: the arguments of the split."""
        call, ring = self.call, self.call.ranks // self.ulysses
        return call.past, call.new, self.ulysses, ring, call.block_multiple, call.in_order

    def split(self) -> Split:
        return _split(*self._grid)

    def seconds(self, pairs: Times | float, queries: int, keys: int, part: int = 1) -> Times:
        """Seconds of attention over ``pairs`` (query, key) pairs, for 1 / ``part`` of the heads."""
        g, d = self.work.geometry, self.device
        flops = 4 * g.head_dim * g.num_heads * np.asarray(pairs) * self.work.density
        moved = 2 * queries * g.query + keys * g.kv * self.work.density
        return self.batch * np.maximum(flops / (d.flops * d.utilisation), moved / d.bandwidth) / part

    def merging(self, partials: int, part: int = 1) -> float:
        """Seconds to merge the partials of ``partials`` tokens into others: two are read, one is written."""
        return self.batch * 3 * partials * self.work.geometry.partial / self.device.bandwidth / part

    def ordering(self, size: int) -> float:
        """Seconds to bring ``size`` bytes into the order of positions: they are read and written once."""
        return self.batch * 2 * size / self.device.bandwidth

    def visible(self) -> Times:
        """[P] pairs of each rank's queries with all keys that they see."""
        begin, end = _edges(self.split())
        return (_pairs_before(end, self.work.window) - _pairs_before(begin, self.work.window)).sum(1)

    def pairs_by_source(self) -> np.ndarray:
        """[R, R] pairs of each ring group's queries with the keys, new and stored, that each group holds."""
        return _pairs_by_source(*self._grid)


@lru_cache(64)
def _split(past: int, new: int, ulysses: int, ring: int, block_multiple: int, in_order: bool) -> Split:
    if in_order:
        return contiguous(past, past + new, ulysses * ring, block_multiple)
    return usp_split(past, past + new, ulysses, ring, block_multiple)


def _edges(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """[P, chunks]: the positions at which each rank's chunks begin, and those at which they end."""
    chunks = np.array(split.chunks, dtype=np.float64)
    return chunks[..., 0], chunks[..., 1]


def _triangle(n: np.ndarray) -> np.ndarray:
    n = np.maximum(n, 0)
    return n * (n + 1) / 2


def _pairs_before(position: np.ndarray, window: int | None) -> np.ndarray:
    """The number of pairs of all queries before ``position`` with the keys that they see."""
    return _triangle(position) - (0 if window is None else _triangle(position - window))


@lru_cache(2)
def _pairs_by_source(past: int, new: int, ulysses: int, ring: int, *how: Any) -> np.ndarray:
    begin, end = (x.reshape(ring, -1) for x in _edges(_split(past, new, ulysses, ring, *how)))
    pairs = np.zeros((ring, ring))  # chunk by chunk: all at once would be several times as large
    for a, b in zip(begin.T[..., None], end.T[..., None], strict=True):  # queries [R, 1]
        for c, d in zip(begin.T, end.T, strict=True):  # keys [R]
            pairs += _triangle(b - c) - _triangle(a - c) - _triangle(b - d) + _triangle(a - d)
    return pairs + (end - begin).sum(1)[:, None] * past / ring


def _gather(clock: _Clock, attention: _Attention, ready: Times) -> Times:
    g = attention.work.geometry
    arrived = clock.all_gather(attention.batch * (attention.rows + attention.stored) * g.kv, ready)
    order = attention.ordering(clock.ranks * (attention.rows + attention.stored) * g.kv)
    keys = attention.call.new + attention.call.past
    return clock.compute(attention.seconds(attention.visible(), attention.rows, keys) + order, arrived)


def _ring(clock: _Clock, attention: _Attention, ready: Times) -> Times:
    """A ring over groups of ``ulysses`` ranks. Each rank has a part of the heads of its group's tokens."""
    u, g = attention.ulysses, attention.work.geometry
    ring = clock.ranks // u
    queries, keys = attention.rows * u, (attention.rows + attention.stored) * u
    size = attention.batch * (attention.rows + attention.stored) * g.replicated(u)
    pairs = attention.pairs_by_source()
    group = np.arange(ring)
    arrived, done = ready, ready
    for step in range(ring):
        free = np.maximum(arrived, done)
        if step + 1 < ring:
            arrived = clock.shift(size, u, free)
        seconds = attention.seconds(pairs[group, (group - step) % ring].repeat(u), queries, keys, u)
        done = clock.compute(seconds + (attention.merging(queries, u) if step else 0), free)
    return done


def _ulysses(clock: _Clock, attention: _Attention, ready: Times) -> Times:
    """Ulysses and usp: with a single group the ring has one block."""
    u, g = attention.ulysses, attention.work.geometry
    there = attention.rows * g.query + (attention.rows + attention.stored) * g.replicated(u)
    ready = clock.all_to_all(attention.batch * there // u, u, ready)
    ready = clock.compute(attention.ordering(there), ready)
    done = _ring(clock, attention, ready)
    return clock.all_to_all(attention.batch * attention.rows * g.query // u, u, done)


def _pass_q(clock: _Clock, attention: _Attention, ready: Times) -> Times:
    g = attention.work.geometry
    arrived = clock.all_gather(attention.batch * attention.rows * g.query, ready)
    tokens = attention.rows * clock.ranks
    pairs, order = attention.pairs_by_source().sum(0), attention.ordering(tokens * g.query)
    done = clock.compute(attention.seconds(pairs, tokens, attention.rows + attention.stored) + order, arrived)
    back = clock.all_to_all(attention.batch * attention.rows * g.partial, clock.ranks, done)
    return clock.compute(attention.merging(tokens), back)


def _fetch(clock: _Clock, attention: _Attention, ready: Times) -> Times:
    g, end = attention.work.geometry, attention.call.past + attention.call.new
    volume = window_volume(g, attention.call, attention.work.window or end)
    bits = attention.batch * g.num_kv_heads * -(-end // 8)
    known = clock.all_gather(bits, ready)
    rows = volume // (clock.ranks - 1) - bits
    arrived = clock.all_to_all(rows, clock.ranks, known)
    return clock.compute(attention.seconds(attention.visible(), attention.rows, attention.rows), arrived)


_SCHEDULES: dict[str, Callable[[_Clock, _Attention, Times], Times]] = {
    "gather": _gather,
    "ring": _ring,
    "ulysses": _ulysses,
    "usp": _ulysses,
    "pass_q": _pass_q,
    "fetch": _fetch,
}


def simulate(mechanism: str, work: Work, device: Device, call: PrefillCall) -> Trace:
    """Simulate one layer of one call of a prefill. The stored tokens lie evenly on the ranks.

    Only gather and fetch take a layer's window into account; the other mechanisms count every visible key.
    Raises ValueError for a mechanism that cannot serve the heads.
    """
    ranks, geometry = call.ranks, work.geometry
    if reason := refusals(geometry, ranks, call.past, call.ulysses).get(mechanism):
        raise ValueError(f"{mechanism} cannot be simulated: {reason}.")
    group = {"ulysses": ranks, "usp": call.ulysses or 1}.get(mechanism, 1)
    attention = _Attention(work, device, call, group)
    clock = _Clock(device, ranks)
    dense = 2 * call.batch * call.rows * work.parameters / (device.flops * device.utilisation)
    ready = clock.compute(np.maximum(dense, work.parameters * geometry.element_size / device.bandwidth))
    if ranks == 1:
        seconds = attention.seconds(attention.visible(), call.new, call.new + call.past)
        done = clock.compute(seconds, ready)
    else:
        done = _SCHEDULES[mechanism](clock, attention, ready)
    return Trace(float(done.max()), float(clock.busy.max()), clock.sent)


def scaling(
    work: Work,
    device: Device,
    ranks: Sequence[int],
    length: int,
    per_rank: int,
    mechanisms: Sequence[str] = ("gather", "ring", "ulysses", "usp"),
    in_order: bool = False,
) -> list[dict[str, Any]]:
    """Strong scaling (``length`` tokens on any number of ranks) and weak scaling (``per_rank`` tokens on each
    rank). in_order: see ``PrefillCall``.

    -> one row for each kind, mechanism and number of ranks that are possible: the seconds of one layer, those
    of one rank with the same tokens, and efficiency = one rank's seconds / (ranks * seconds). Attention grows
    with the square of the length, so weak scaling is compared with one rank on the same longer text, not with
    constant time.
    """
    rows = []
    for kind in ("strong", "weak"):
        for count in ranks:
            tokens = length if kind == "strong" else per_rank * count
            alone = simulate("gather", work, device, PrefillCall(1, tokens)).seconds
            group = device.per_node if 1 < device.per_node < count else None
            absent = refusals(work.geometry, count, 0, group)
            call = PrefillCall(count, tokens, ulysses=group, in_order=in_order)
            for mechanism in mechanisms:
                if mechanism in absent:
                    continue
                trace = simulate(mechanism, work, device, call)
                rows.append(
                    {
                        "kind": kind,
                        "mechanism": mechanism,
                        "ranks": count,
                        "tokens": tokens,
                        "seconds": trace.seconds,
                        "busy_seconds": trace.busy,
                        "one_rank_seconds": alone,
                        "efficiency": alone / (count * trace.seconds),
                        "sent_bytes": trace.sent,
                    }
                )
    return rows
