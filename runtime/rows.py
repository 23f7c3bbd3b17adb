"""Which rows of a batch one call of a layer serves at once, and which apart.

A row of a padded batch gives what it gives alone. So each row has its own phase: in a short call on a cache
that is not empty, a row decodes if it has keys from before, and is at its prefill if it begins in this call.
A row that has no token yet is not served; its queries are padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

from torch import Tensor

from ..attention.attend import Reads
from ..attention.method import DECODE, PREFILL
from ..attention.partial import Partial, empty_partial
from ..parallel.mechanisms.call import Travel

Kind = TypeVar("Kind")


class Run(NamedTuple):
    """Neighbouring rows that are served at once. below: they have fewer keys than the crossover, and are
    served by dense attention."""

    rows: slice
    phase: str
    below: bool

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.rows.stop - self.rows.start


class Done(NamedTuple):
    """What a run gives: its attention, what that read, which (operation, implementation) pairs ran, and how
    data moved over ranks."""

    run: Run
    part: Partial
    reads: Reads
    ran: Iterable[tuple[str, str]]
    travel: Travel | None = None


class Served(NamedTuple):
    """The rows of one call. runs: those that attend. ended: those whose prefill has run when the call ends,
    for the decode method's ``on_prefill_end``."""

    runs: list[Run]
    ended: list[slice]


def served(
    starts: list[int] | None,
    batch: int,
    past: int,
    total: int,
    *,
    ends: list[int] | None = None,
    short: bool,
    crossover: Mapping[str, float],
    groups: list[range],
) -> Served:
    """The rows of a call that takes the sequence from ``past`` to ``total`` positions.

    starts: where rows begin; None: at 0, all of them. ends: where rows end that are padded on the right.
    short: the call is a decode step for rows that have keys. crossover: by phase, how many keys a row needs
    for the method. groups: rows whose state is one value; no run, and no entry of ``ended``, spans two of
    them.
    """
    holder = [place for place, group in enumerate(groups) for _ in group]
    kinds: list[tuple[str, bool, int] | None] = []
    ended: list[int | None] = []
    for row, first in enumerate(starts or [0] * batch):
        phase = DECODE if short and first < past else PREFILL
        below = (ends[row] if ends else total) - first < crossover.get(phase, 0)
        begun = first < total
        kinds.append((phase, below, holder[row] if phase == DECODE else 0) if begun else None)
        # In a long call rows without a token end with the others, so that the batch stays one group.
        ended.append(holder[row] if phase == PREFILL and (begun or not short) else None)
    if not any(kinds):
        return Served([], [])
    return Served(
        [Run(rows, phase, below) for (phase, below, _), rows in _neighbours(kinds)],
        [rows for _, rows in _neighbours(ended)],
    )


def _neighbours(kinds: Sequence[Kind | None]) -> list[tuple[Kind, slice]]:
    """Neighbouring rows of one kind; those of None are left out."""
    found, at = [], 0
    for kind, rows in groupby(kinds):
        begin, at = at, at + len(list(rows))
        if kind is not None:
            found.append((kind, slice(begin, at)))
    return found


def joined(done: list[Done], q: Tensor, value_dim: int) -> Partial:
    """One Partial of all runs of a call of queries q [B, H, Tq, D]; (0, -inf) in rows that are in no run."""
    if len(done) == 1 and done[0].run.size == q.shape[0]:
        return done[0].part
    whole = empty_partial(q, value_dim)
    for run, part, *_ in done:
        whole.out[run.rows], whole.lse[run.rows] = part.out.to(q.dtype), part.lse.to(whole.lse.dtype)
    return whole


def total_reads(done: Iterable[Done]) -> Reads:
    """What all runs have read, with the first reason that one of them gives."""
    total = Reads()
    for _, _, reads, *_ in done:
        total += reads
        total.reason = total.reason or reads.reason
    return total
