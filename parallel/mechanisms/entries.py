"""Block summaries, whole on every rank: each rank computes those of its own positions, then all are gathered.

A summary is hundreds of times smaller than what it is computed from. With all of them every rank selects as
one device does, by absolute block number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from ...attention.sources import IN_NO_CACHE, Recent, Source, Sources
from ...attention.summary import Summaries, Summary, by_start, count_entries
from ..group.comm import Ranks
from .edges import beyond
from .gather import gather_rows
from .layout import Layout, Span, Split


@dataclass
class Past:
    """What summaries read of the positions before a call.

    held: which rank holds which of the ``length`` positions. stored: called with a name and two numbers a, b;
    returns the rank's own a-th to (b-1)-th position [B, any, b - a, any] of what follows from its cache.
    recent: the last positions, the same on every rank.
    """

    held: Layout
    length: int
    stored: Callable[[Source, int, int], Tensor]
    recent: Recent
    ranks: Ranks

    def since(self, names: Iterable[Source], first: int) -> Sources:
        """The positions first .. length - 1, the same on every rank. What ``recent`` lacks is gathered, and
        is in ``recent`` afterwards. Raises FarspanError for what is in no cache."""
        found: dict[Source, Tensor] = {}
        for name in sorted(names):
            known = self.recent.begin(name) if self.recent.end == self.length else self.length
            if first < known and name not in IN_NO_CACHE:
                a, b = (self.held.below(self.ranks.rank, position) for position in (first, known))
                layout = self.held.cut(first, known)
                head = gather_rows(self.stored(name, a, b), layout, self.ranks, "open_block")
                self.recent = self.recent.preceded_by(name, head, known)
            found[name] = self.recent.since(name, first, self.length)
        return Sources(found)


def extend(
    summary: Summary, shared: Summaries, own: Sources | None, past: Past, starts: list[int] | None
) -> None:
    """Summarise the positions after the first ``shared.done``. own: those of the call, which every rank has;
    None: there are none."""
    total = past.length + (0 if own is None else own.length)
    begin = min(shared.open(summary, starts), total - 1)
    if own is None:
        x = past.since(summary.reads, begin)
    elif begin < past.length:
        x = past.since(summary.reads, begin).followed_by(own)
    else:
        x = own.cut(begin - past.length)
    shared.extend(summary, x, begin, starts)


def extend_split(
    summary: Summary,
    shared: Summaries,
    own: Sources,
    past: Past,
    split: Split,
    starts: list[int] | None,
) -> None:
    """Summarise the new positions of all ranks. own: the split.rows positions that this rank has computed."""
    size, ranks = summary.block, past.ranks
    assert size is not None, "a label stays on the rank of its position"
    own = Sources({name: own.tensors[name] for name in sorted(summary.reads)})
    firsts = starts or [0] * own.batch
    if shared.done(summary) < split.begin:  # no method has used this summary since
        extend(summary, shared, None, past, starts)
    opened = min(shared.open(summary, starts), split.begin)
    head = past.since(summary.reads, opened) if opened < split.begin else own.cut(0, 0)
    tails = _tails(size, own, split, firsts, ranks)
    plan = {
        chunk: [
            (*_blocks(summary, chunk, split.begin, first), first, rows) for first, rows in by_start(firsts)
        ]
        for chunks in split.chunks
        for chunk in chunks
    }
    computed: list[tuple[int, list[int] | slice, Tensor]] = []
    for i, (slot, chunk) in enumerate(_every_slot(split, ranks.rank)):
        x, at = own.cut(slot.start, slot.stop), chunk[0]
        if chunk[0] == split.begin:
            x, at = head.followed_by(x), opened
        if chunk in tails:
            x = x.followed_by(tails[chunk])
        for block, count, first, rows in plan[chunk]:
            begin = first + block * size - at
            if count:
                entries = summary.compute(x.cut(begin, begin + count * size, rows))
                computed.append((i, rows, entries))
    like = computed[0][2] if computed else summary.compute(own.cut(0, 1))
    buffer = shared.room(summary, like, own.batch, split.end)
    room = max(count for parts in plan.values() for _, count, _, _ in parts)
    if not room:
        return
    mine = like.new_zeros(len(split.chunks[0]), own.batch, like.shape[1], room, like.shape[3])
    for i, rows, entries in computed:
        mine[i][rows, :, : entries.shape[2]] = entries
    every = ranks.all_gather(mine, "summaries")  # [P, chunks, B, heads, room, width]
    for rank, chunks in enumerate(split.chunks):
        for i, chunk in enumerate(chunks):
            for block, count, _, rows in plan[chunk]:
                buffer[rows, :, block : block + count] = every[rank, i][rows, :, :count]


def last_positions(x: Tensor, count: int, split: Split, ranks: Ranks, name: str) -> Tensor:
    """x [B, any, split.rows, any], of this rank -> the last ``count`` positions of the call, on every
    rank."""
    layout, begin = split.layout(), split.end - count
    mine = split.real(x, ranks.rank)[:, :, layout.below(ranks.rank, begin) :]
    return gather_rows(mine, layout.cut(begin, split.end), ranks, name)


def _every_slot(split: Split, rank: int) -> list[tuple[slice, Span]]:
    return [
        (slice(i * split.width, i * split.width + b - a), (a, b))
        for i, (a, b) in enumerate(split.chunks[rank])
    ]


def _blocks(summary: Summary, chunk: Span, begin: int, first: int) -> tuple[int, int]:
    """(the number of the first, the count) of the blocks whose summaries the rank of a chunk computes: those
    that begin in the chunk, and for the call's first chunk the block that was open before the call. The row
    of the batch begins at position ``first``."""
    (a, b), block = chunk, summary.block or 1
    if a >= b or first >= b:
        return 0, 0
    low = max(a - first, 0)
    number = low // block if a == begin else -(-low // block)
    return number, max(0, count_entries(summary, b - first) - number)


def _tails(size: int, own: Sources, split: Split, firsts: list[int], ranks: Ranks) -> dict[Span, Sources]:
    """By chunk, the positions after it that its last block takes in. Nothing is sent where blocks end with
    chunks."""
    chunks = [chunk for rank in range(split.size) for _, chunk in split.slots(rank)]
    if all((a - first) % size == 0 or a <= first for a, _ in chunks for first in firsts):
        return {}
    parts = {name: beyond(x, 0, size - 1, split, ranks, "edges")[0] for name, x in own.tensors.items()}
    return {
        chunk: Sources({name: part[chunk].after for name, part in parts.items()})
        for _, chunk in split.slots(ranks.rank)
    }
