"""Which positions of one sequence each rank holds.

A ``Split`` divides the tokens of one call among the ranks. A ``Layout`` says which rank holds which stored
positions. Both are plain numbers, and every rank computes the same ones without communication.

    zigzag, P = 2:  chunk   0 1 2 3      every rank has one early and one late chunk,
                    rank    0 1 1 0      so that causal attention is equal work
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Span = tuple[int, int]  # positions [begin, end)


@dataclass(frozen=True)
class Layout:
    """Positions held by each rank: ``spans[rank]``, disjoint, ascending, none empty.

    A rank stores its keys in the order of their positions, so a crop removes the last keys of every rank.
    """

    spans: tuple[tuple[Span, ...], ...]

    @staticmethod
    def empty(size: int) -> Layout:
        """``size`` ranks that hold nothing."""
        return Layout(((),) * size)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.spans)

    @property
    def length(self) -> int:
        """The last position that any rank holds, plus 1."""
        return max((spans[-1][1] for spans in self.spans if spans), default=0)

    @property
    def begin(self) -> int:
        """The first position that any rank holds; 0 where none holds any."""
        return min((spans[0][0] for spans in self.spans if spans), default=0)

    def count(self, rank: int) -> int:
        """Positions that ``rank`` holds."""
        return sum(b - a for a, b in self.spans[rank])

    def below(self, rank: int, position: int) -> int:
        """How many of the rank's positions come before ``position``."""
        return sum(min(b, position) - a for a, b in self.spans[rank] if a < position)

    def positions(self, rank: int, device: torch.device | None = None) -> Tensor:
        """[count] int64, ascending. The tensor is cached: do not write to it."""
        return _positions(self.spans[rank], device or torch.device("cpu"))

    def extended(self, other: Layout) -> Layout:
        """This layout followed by ``other``, whose positions are all later."""
        pairs = zip(self.spans, other.spans, strict=True)
        return Layout(tuple(_joined(a + b) if b else a for a, b in pairs))

    def lightest(self) -> list[int]:
        """The ranks in the order of how many positions they hold, fewest first."""
        counts = [self.count(rank) for rank in range(self.size)]
        return sorted(range(self.size), key=counts.__getitem__)

    def block_cyclic(self, begin: int, end: int, block: int) -> Layout:
        """This layout followed by the positions begin .. end - 1, in blocks of ``block`` positions counted
        from position 0. A block that has begun is continued by its rank; a new one goes to the rank that
        holds the fewest positions."""
        layout = self
        while begin < end:
            stop = min((begin // block + 1) * block, end)
            owners = [r for r, spans in enumerate(layout.spans) if spans and spans[-1][1] == begin]
            owner = owners[0] if owners and begin % block else layout.lightest()[0]
            more = tuple(((begin, stop),) if rank == owner else () for rank in range(self.size))
            layout, begin = layout.extended(Layout(more)), stop
        return layout

    def cut(self, begin: int, end: int) -> Layout:
        """The part that lies in [begin, end)."""
        return Layout(
            tuple(
                tuple((max(a, begin), min(b, end)) for a, b in spans if max(a, begin) < min(b, end))
                for spans in self.spans
            )
        )


@lru_cache(maxsize=32)  # every layer of a call needs the same
@torch.inference_mode(False)
def _positions(spans: tuple[Span, ...], device: torch.device) -> Tensor:
    parts = [torch.arange(a, b, device=device) for a, b in spans]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device=device)


def _joined(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for a, b in spans:
        if joined and joined[-1][1] == a:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return tuple(joined)


@dataclass(frozen=True)
class Split:
    """How the tokens begin .. end - 1 of one call are divided among the ranks.

    chunks[rank]: the rank's chunks, ascending spans. All ranks have equally many; some chunks may be empty.
    Every chunk is computed at ``width`` tokens, the length of the longest one. *Split padding* completes the
    shorter ones: tokens of the call once more, whose results are not used. It is no padding of the batch.
    """

    begin: int
    end: int
    chunks: tuple[tuple[Span, ...], ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.chunks)

    @property
    def width(self) -> int:
        """Tokens that are computed for each chunk."""
        return max(b - a for chunks in self.chunks for a, b in chunks)

    @property
    def rows(self) -> int:
        """Tokens that each rank computes, with split padding."""
        return len(self.chunks[0]) * self.width

    def earlier(self, count: int) -> Split:
        """The same with all positions ``count`` lower."""
        chunks = tuple(tuple((a - count, b - count) for a, b in chunks) for chunks in self.chunks)
        return Split(self.begin - count, self.end - count, chunks)

    def layout(self) -> Layout:
        """Which rank has computed, and so stores, which position."""
        return Layout(tuple(_joined(tuple(s for s in chunks if s[0] < s[1])) for chunks in self.chunks))

    def slots(self, rank: int) -> list[tuple[slice, Span]]:
        """For each non-empty chunk of the rank: where it lies in the computed rows, and its positions."""
        width = self.width
        return [
            (slice(i * width, i * width + b - a), (a, b))
            for i, (a, b) in enumerate(self.chunks[rank])
            if a < b
        ]

    def take(self, rank: int, device: torch.device | None = None) -> Tensor:
        """[rows] int64: the tokens of the call, counted from its first, that the rank computes."""
        places = [torch.arange(a, a + self.width, device=device) for a, _ in self.chunks[rank]]
        return (torch.cat(places) - self.begin).clamp_(max=self.end - self.begin - 1)

    def real(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """x, with ``rows`` entries along ``dim``, without split padding, in the order of positions."""
        parts = [x.narrow(dim, s.start, s.stop - s.start) for s, _ in self.slots(rank)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def joined(self, parts: Tensor, dim: int = 2) -> Tensor:
        """The computed rows of all ranks, parts [P, ...] with ``rows`` entries along ``dim`` of each -> in
        the order of positions, without split padding."""
        pieces = [
            (a, parts[rank].narrow(dim, s.start, s.stop - s.start))
            for rank in range(self.size)
            for s, (a, _) in self.slots(rank)
        ]
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], dim)


def _cuts(begin: int, end: int, pieces: int, block_multiple: int) -> list[Span]:
    """``pieces`` spans whose lengths are multiples of ``block_multiple`` and differ by at most one multiple,
    the longer ones first. The last span that is not empty may be shorter."""
    units = -(-(end - begin) // block_multiple)
    sizes = [units // pieces + (i < units % pieces) for i in range(pieces)]
    edges = [min(begin + block_multiple * n, end) for n in accumulate(sizes, initial=0)]
    return list(pairwise(edges))


def zigzag(begin: int, end: int, size: int, block_multiple: int = 1, held: Layout | None = None) -> Split:
    """2 P chunks of whole multiples of ``block_multiple``. The r-th chunk from the front and the r-th from
    the back go to one rank: rank r, or with ``held`` the rank that holds the r-th fewest positions, since the
    first chunks are the longer ones."""
    plain = usp_split(begin, end, 1, size, block_multiple)
    if held is None:
        return plain
    place = {rank: i for i, rank in enumerate(held.lightest())}
    return Split(begin, end, tuple(plain.chunks[place[rank]] for rank in range(size)))


def contiguous(begin: int, end: int, size: int, block_multiple: int = 1) -> Split:
    """One chunk of whole multiples of ``block_multiple`` for each rank, in the order of the ranks."""
    return Split(begin, end, tuple((span,) for span in _cuts(begin, end, size, block_multiple)))


def usp_split(begin: int, end: int, ulysses: int, ring: int, block_multiple: int = 1) -> Split:
    """A zigzag over ``ring`` groups of ``ulysses`` ranks. The ranks r * ulysses + u of a group share each of
    its chunks, one piece for each."""
    spans = _cuts(begin, end, 2 * ring * ulysses, block_multiple)
    return Split(
        begin,
        end,
        tuple(
            tuple(sorted((spans[r * ulysses + u], spans[(2 * ring - 1 - r) * ulysses + u])))
            for r in range(ring)
            for u in range(ulysses)
        ),
    )
