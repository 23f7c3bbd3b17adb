"""Which positions of one sequence each rank holds.

A ``Split`` shares the tokens of one call out over the ranks; a ``Layout`` remembers, for everything stored,
who has it. Both are plain numbers that every rank works out alike, so nothing has to be asked.

    zigzag, P = 2:  chunk   0 1 2 3      every rank meets one early and one late chunk,
                    rank    0 1 1 0      so that causal work is equal
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

    A rank's rows are stored in the order of their positions, so a crop takes the last rows of every rank.
    """

    spans: tuple[tuple[Span, ...], ...]

    @staticmethod
    def empty(size: int) -> Layout:
        return Layout(((),) * size)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.spans)

    @property
    def length(self) -> int:
        """Positions held by all ranks together: 0 .. length - 1."""
        return max((spans[-1][1] for spans in self.spans if spans), default=0)

    @property
    def begin(self) -> int:
        """The smallest position that is held; 0 where none is."""
        return min((spans[0][0] for spans in self.spans if spans), default=0)

    def count(self, rank: int) -> int:
        """Positions that ``rank`` holds."""
        return sum(b - a for a, b in self.spans[rank])

    def below(self, rank: int, position: int) -> int:
        """How many of the rank's positions come before ``position``."""
        return sum(min(b, position) - a for a, b in self.spans[rank] if a < position)

    def positions(self, rank: int, device: torch.device | None = None) -> Tensor:
        """[count] int64, ascending; not to be written to."""
        return _positions(self.spans[rank], device or torch.device("cpu"))

    def extended(self, other: Layout) -> Layout:
        """With the positions of ``other``, all of them later than those here, behind."""
        pairs = zip(self.spans, other.spans, strict=True)
        return Layout(tuple(_joined(a + b) if b else a for a, b in pairs))

    def lightest(self) -> list[int]:
        """The ranks, those that hold least first."""
        counts = [self.count(rank) for rank in range(self.size)]
        return sorted(range(self.size), key=counts.__getitem__)

    def block_cyclic(self, begin: int, end: int, block: int) -> Layout:
        """With the positions begin .. end - 1 behind, in blocks of ``block`` counted from position 0: a block
        that has begun is filled up by its rank, a new one goes to the rank that holds least."""
        layout = self
        while begin < end:
            stop = min((begin // block + 1) * block, end)
            owners = [r for r, spans in enumerate(layout.spans) if spans and spans[-1][1] == begin]
            owner = owners[0] if owners and begin % block else layout.lightest()[0]
            more = tuple(((begin, stop),) if rank == owner else () for rank in range(self.size))
            layout, begin = layout.extended(Layout(more)), stop
        return layout

    def cut(self, begin: int, end: int) -> Layout:
        """What lies in [begin, end)."""
        return Layout(
            tuple(
                tuple((max(a, begin), min(b, end)) for a, b in spans if max(a, begin) < min(b, end))
                for spans in self.spans
            )
        )


@lru_cache(maxsize=32)  # every layer of a call asks for the same
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
    """The tokens begin .. end - 1 of one call, shared out.

    chunks[rank]: the rank's chunks, ascending spans; some may be empty, and every rank has as many. Each is
    computed at ``width`` tokens, the widest chunk: what a chunk lacks is filled with repeated tokens, whose
    results nobody reads.
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
        """Tokens at which each chunk is computed."""
        return max(b - a for chunks in self.chunks for a, b in chunks)

    @property
    def rows(self) -> int:
        """Tokens that each rank computes, filling included."""
        return len(self.chunks[0]) * self.width

    def layout(self) -> Layout:
        """Who has computed, and so stores, which position."""
        return Layout(tuple(_joined(tuple(s for s in chunks if s[0] < s[1])) for chunks in self.chunks))

    def slots(self, rank: int) -> list[tuple[slice, Span]]:
        """Of the rank's computed rows, the part that holds each non-empty chunk."""
        width = self.width
        return [
            (slice(i * width, i * width + b - a), (a, b))
            for i, (a, b) in enumerate(self.chunks[rank])
            if a < b
        ]

    def take(self, rank: int, device: torch.device | None = None) -> Tensor:
        """[rows] int64: which tokens of the call, counted from its first, the rank computes."""
        places = [torch.arange(a, a + self.width, device=device) for a, _ in self.chunks[rank]]
        return (torch.cat(places) - self.begin).clamp_(max=self.end - self.begin - 1)

    def real(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """The rows of x (``rows`` of them along ``dim``) that are no filling, in the order of positions."""
        parts = [x.narrow(dim, s.start, s.stop - s.start) for s, _ in self.slots(rank)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def joined(self, parts: Tensor, dim: int = 2) -> Tensor:
        """All ranks' computed rows, parts [P, ...] with ``rows`` along ``dim`` of each -> in the order of
        positions, without filling."""
        pieces = [
            (a, parts[rank].narrow(dim, s.start, s.stop - s.start))
            for rank in range(self.size)
            for s, (a, _) in self.slots(rank)
        ]
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], dim)


def _cuts(begin: int, end: int, pieces: int, block_multiple: int) -> list[Span]:
    """``pieces`` spans of as equal numbers of whole multiples of ``block_multiple`` as can be, the longer
    ones first; the last one may be shorter."""
    units = -(-(end - begin) // block_multiple)
    sizes = [units // pieces + (i < units % pieces) for i in range(pieces)]
    edges = [min(begin + block_multiple * n, end) for n in accumulate(sizes, initial=0)]
    return list(pairwise(edges))


def zigzag(begin: int, end: int, size: int, block_multiple: int = 1, held: Layout | None = None) -> Split:
    """2 P chunks of whole multiples of ``block_multiple``, the r-th from the front and the r-th from the back
    on one rank: on rank r, or on the one that holds r-th least in ``held``, since the first chunks are the
    longer ones."""
    plain = usp_split(begin, end, 1, size, block_multiple)
    if held is None:
        return plain
    place = {rank: i for i, rank in enumerate(held.lightest())}
    return Split(begin, end, tuple(plain.chunks[place[rank]] for rank in range(size)))


def contiguous(begin: int, end: int, size: int, block_multiple: int = 1) -> Split:
    """P chunks of whole multiples of ``block_multiple`` in the order of the ranks."""
    return Split(begin, end, tuple((span,) for span in _cuts(begin, end, size, block_multiple)))


def usp_split(begin: int, end: int, ulysses: int, ring: int, block_multiple: int = 1) -> Split:
    """A zigzag over ``ring`` groups, each chunk cut into ``ulysses`` neighbouring pieces; rank r * ulysses +
    u."""
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
