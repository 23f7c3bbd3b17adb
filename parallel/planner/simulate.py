"""One layer's schedule replayed on many ranks: what computes, what travels, what waits for what.

Each rank has one compute engine and one outgoing link, and every operation begins when its engine or link is
free and what it needs is there. All ranks take each step together, so their times are held in arrays.

    gather    the projections, an all-gather of K and V passed round the ring, then attention
    ring      a block's shift to the next rank is posted before the block is attended to; both run at once,
    and
              the next shift waits for both (two buffers)
    ulysses   all-to-all of q, k and v, attention of the rank's heads, all-to-all of the output
    usp       the same inside each group of U ranks, with the ring over groups in the place of attention
    pass_q    an all-gather of q, attention over the rank's own keys, all-to-all of the partials
    fetch     what a sliding-window layer does: all say what they read, and get it by an all-to-all

Assumptions: a message takes latency + bytes / bandwidth; a link carries one message at a time and the two
directions do not disturb each other; networks have no other users and no contention inside them; matrix
products and attention run at utilisation * flops, and no faster than memory delivers their operands; ranks
are alike and start together. A ring all-gather that crosses nodes uses the network cards of the whole node,
as NCCL's channels do; a shift from one rank to the next uses one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..mechanisms.layout import Split, usp_split
from ..mechanisms.volume import Geometry, padded, refusals, window_volume
from .device import Device

Times = np.ndarray  # [P] float64, seconds since the layer began


@dataclass(frozen=True, kw_only=True)
class Work:
    """One layer, whole.

    parameters: of the matrices that every token passes, 2 operations each. window: keys that a query sees at
    most. density: part of the visible keys that is read.
    """

    geometry: Geometry
    parameters: int = 0
    window: int | None = None
    density: float = 1.0


@dataclass(frozen=True)
class Trace:
    """What the replay saw. seconds: until the last rank is done. busy: seconds of compute of the busiest
    rank. sent: bytes that each rank sent."""

    seconds: float
    busy: float
    sent: int


class _Clock:
    """When each rank's engine and link are free, and what they have done."""

    def __init__(self, device: Device, ranks: int) -> None:
        self.device, self.ranks = device, ranks
        self.engine, self.link = np.zeros(ranks), np.zeros(ranks)
        self.busy = np.zeros(ranks)
        self.sent = 0

    def compute(self, seconds: Times | float, after: Times | float = 0.0) -> Times:
        """Run one kernel; -> when it ends."""
        seconds = seconds + self.device.launch
        self.busy += seconds
        self.engine = np.maximum(self.engine, after) + seconds
        return self.engine

    def shift(self, size: int, by: int, after: Times, *, collective: bool = False) -> Times:
        """Every rank sends ``size`` bytes to the rank ``by`` places on in its ring; -> when each has
        received.

        The ring joins the ranks that are ``by`` apart. Sender and receiver must both be ready.
        """
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
        """``size`` bytes of every rank to all, passed on round the ring; -> when each rank has everything."""
        arrived = after + self.device.launch
        for _ in range(self.ranks - 1):
            arrived = self.shift(size, 1, arrived, collective=True)
        return arrived

    def all_to_all(self, size: int, group: int, after: Times) -> Times:
        """Inside each group of neighbours, ``size`` bytes from every rank to each other one, all at once."""
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
class _Call:
    """A layer's attention over one call: sizes, and the pairs that each rank meets in each source's keys."""

    work: Work
    device: Device
    ranks: int
    new: int
    past: int
    ulysses: int
    block_multiple: int
    batch: int

    @property
    def rows(self) -> int:
        return padded(self.new, self.ranks, self.block_multiple) // self.ranks

    @property
    def stored(self) -> int:
        """Rows of the past on each rank."""
        return -(-self.past // self.ranks)

    def split(self) -> Split:
        return _split(self.past, self.new, self.ulysses, self.ranks // self.ulysses, self.block_multiple)

    def attention(self, pairs: Times | float, queries: int, keys: int, part: int = 1) -> Times:
        """Seconds for so many (query, key) pairs of 1 / part of the heads."""
        g, d = self.work.geometry, self.device
        flops = 4 * g.head_dim * g.num_heads * np.asarray(pairs) * self.work.density
        moved = 2 * queries * g.query + keys * g.kv * self.work.density
        return self.batch * np.maximum(flops / (d.flops * d.utilisation), moved / d.bandwidth) / part

    def merging(self, partials: int, part: int = 1) -> float:
        """Seconds to merge so many tokens' partials into those there are: two read, one written."""
        return self.batch * 3 * partials * self.work.geometry.partial / self.device.bandwidth / part

    def ordering(self, size: int) -> float:
        """Seconds to bring what has arrived into the order of positions: read and written once."""
        return self.batch * 2 * size / self.device.bandwidth

    def visible(self) -> Times:
        """[P] pairs of each rank's queries with everything they see."""
        begin, end = _edges(self.split())
        return (_seen(end, self.work.window) - _seen(begin, self.work.window)).sum(1)

    def met(self) -> np.ndarray:
        """[R, R] pairs of each ring group's queries with the keys that each group holds, new and old."""
        return _met(self.past, self.new, self.ulysses, self.ranks // self.ulysses, self.block_multiple)


@lru_cache(64)
def _split(past: int, new: int, ulysses: int, ring: int, block_multiple: int) -> Split:
    return usp_split(past, past + new, ulysses, ring, block_multiple)


def _edges(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """[P, chunks] where each rank's chunks begin and end."""
    chunks = np.array(split.chunks, dtype=np.float64)
    return chunks[..., 0], chunks[..., 1]


def _triangle(n: np.ndarray) -> np.ndarray:
    n = np.maximum(n, 0)
    return n * (n + 1) / 2


def _seen(position: np.ndarray, window: int | None) -> np.ndarray:
    """Pairs of all queries before ``position`` with the keys that they see."""
    return _triangle(position) - (0 if window is None else _triangle(position - window))


@lru_cache(2)
def _met(past: int, new: int, ulysses: int, ring: int, block_multiple: int) -> np.ndarray:
    begin, end = (x.reshape(ring, -1) for x in _edges(_split(past, new, ulysses, ring, block_multiple)))
    pairs = np.zeros((ring, ring))  # chunk by chunk: all at once would be several times as large
    for a, b in zip(begin.T[..., None], end.T[..., None], strict=True):  # queries [R, 1]
        for c, d in zip(begin.T, end.T, strict=True):  # keys [R]
            pairs += _triangle(b - c) - _triangle(a - c) - _triangle(b - d) + _triangle(a - d)
    return pairs + (end - begin).sum(1)[:, None] * past / ring


def _gather(clock: _Clock, call: _Call, ready: Times) -> Times:
    g = call.work.geometry
    arrived = clock.all_gather(call.batch * (call.rows + call.stored) * g.kv, ready)
    order = call.ordering(clock.ranks * (call.rows + call.stored) * g.kv)
    return clock.compute(call.attention(call.visible(), call.rows, call.new + call.past) + order, arrived)


def _ring(clock: _Clock, call: _Call, ready: Times) -> Times:
    """The ring over groups of ``call.ulysses`` ranks; each rank has its part of the heads of its group's
    tokens."""
    u, g = call.ulysses, call.work.geometry
    ring = clock.ranks // u
    queries, keys = call.rows * u, (call.rows + call.stored) * u
    size = call.batch * (call.rows + call.stored) * g.replicated(u)
    met = call.met()
    group = np.arange(ring)
    arrived, done = ready, ready
    for step in range(ring):
        free = np.maximum(arrived, done)
        if step + 1 < ring:
            arrived = clock.shift(size, u, free)
        seconds = call.attention(met[group, (group - step) % ring].repeat(u), queries, keys, u)
        done = clock.compute(seconds + (call.merging(queries, u) if step else 0), free)
    return done


def _ulysses(clock: _Clock, call: _Call, ready: Times) -> Times:
    """Also usp's frame: with one group, the ring is a single block."""
    u, g = call.ulysses, call.work.geometry
    there = call.rows * g.query + (call.rows + call.stored) * g.replicated(u)
    ready = clock.all_to_all(call.batch * there // u, u, ready)
    ready = clock.compute(call.ordering(there), ready)
    done = _ring(clock, call, ready)
    return clock.all_to_all(call.batch * call.rows * g.query // u, u, done)


def _pass_q(clock: _Clock, call: _Call, ready: Times) -> Times:
    g = call.work.geometry
    arrived = clock.all_gather(call.batch * call.rows * g.query, ready)
    everyone = call.rows * clock.ranks
    pairs, order = call.met().sum(0), call.ordering(everyone * g.query)
    done = clock.compute(call.attention(pairs, everyone, call.rows + call.stored) + order, arrived)
    back = clock.all_to_all(call.batch * call.rows * g.partial, clock.ranks, done)
    return clock.compute(call.merging(everyone), back)


def _fetch(clock: _Clock, call: _Call, ready: Times) -> Times:
    g, end = call.work.geometry, call.past + call.new
    window = call.work.window or end
    volume = window_volume(
        g, clock.ranks, call.new, window, call.past, block_multiple=call.block_multiple, batch=call.batch
    )
    bits = call.batch * g.num_kv_heads * -(-end // 8)
    asked = clock.all_gather(bits, ready)
    rows = volume // (clock.ranks - 1) - bits
    arrived = clock.all_to_all(rows, clock.ranks, asked)
    return clock.compute(call.attention(call.visible(), call.rows, call.rows), arrived)


_SCHEDULES: dict[str, Callable[[_Clock, _Call, Times], Times]] = {
    "gather": _gather,
    "ring": _ring,
    "ulysses": _ulysses,
    "usp": _ulysses,
    "pass_q": _pass_q,
    "fetch": _fetch,
}


def simulate(
    mechanism: str,
    work: Work,
    device: Device,
    ranks: int,
    new: int,
    past: int = 0,
    *,
    ulysses: int | None = None,
    block_multiple: int = 1,
    batch: int = 1,
) -> Trace:
    """Replay one layer of a prefill of ``new`` tokens after ``past`` stored ones, which lie evenly on the
    ranks.

    ulysses: U of usp's ranks = U * R. Only gather and fetch know a layer's window; the others count every
    visible key. Raises ValueError for a mechanism that cannot serve the heads.
    """
    if reason := refusals(work.geometry, ranks, past, ulysses).get(mechanism):
        raise ValueError(f"{mechanism} cannot be replayed: {reason}.")
    u = {"ulysses": ranks, "usp": ulysses or 1}.get(mechanism, 1)
    call = _Call(work, device, ranks, new, past, u, block_multiple, batch)
    clock = _Clock(device, ranks)
    dense = 2 * batch * call.rows * work.parameters / (device.flops * device.utilisation)
    ready = clock.compute(np.maximum(dense, work.parameters * work.geometry.element_size / device.bandwidth))
    if ranks == 1:
        done = clock.compute(call.attention(call.visible(), new, new + past), ready)
    else:
        done = _SCHEDULES[mechanism](clock, call, ready)
    return Trace(float(done.max()), float(clock.busy.max()), clock.sent)


def scaling(
    work: Work,
    device: Device,
    ranks: Sequence[int],
    length: int,
    per_rank: int,
    mechanisms: Sequence[str] = ("gather", "ring", "ulysses", "usp"),
) -> list[dict[str, Any]]:
    """Strong scaling (``length`` tokens on any number of ranks) and weak scaling (``per_rank`` tokens on
    each).

    -> a row per kind, mechanism and number of ranks that can be: seconds of one layer, those of one rank with
    the same tokens, and efficiency = one rank's seconds / (ranks * seconds). Attention grows with the square
    of the length, so weak scaling is held against the same longer text on one rank, not against constant
    time.
    """
    rows = []
    for kind in ("strong", "weak"):
        for count in ranks:
            tokens = length if kind == "strong" else per_rank * count
            alone = simulate("gather", work, device, 1, tokens).seconds
            group = device.per_node if 1 < device.per_node < count else None
            absent = refusals(work.geometry, count, 0, group)
            for mechanism in mechanisms:
                if mechanism in absent:
                    continue
                trace = simulate(mechanism, work, device, count, tokens, ulysses=group)
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
