"""Divide the rows of a batch into the runs that one layer call serves together.

The result of a row in a padded batch is its result alone. So each row has its own phase. In a short call on a
cache that is not empty, a row with keys from earlier calls decodes, and a row that begins in this call is in
prefill. A row without a token so far is not served, because its queries are padding.
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
    """Neighbouring rows that are served together. below: whether they have fewer keys than the crossover, so
    that dense attention serves them."""

    rows: slice
    phase: str
    below: bool

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.rows.stop - self.rows.start


class Done(NamedTuple):
    """The result of a run.

    part: its attention. reads: the counts of what it read. ran: the (operation, implementation) pairs.
    travel: over ranks, the data that moved.
    """

    run: Run
    part: Partial
    reads: Reads
    ran: Iterable[tuple[str, str]]
    travel: Travel | None = None


class Served(NamedTuple):
    """The rows of one call. runs: the rows that attend. ended: the rows whose prefill ends with the call, for
    which the decode method's ``on_prefill_end`` is called."""

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
    """The runs of a call that extends the sequence from ``past`` to ``total`` positions.

    starts: the positions at which rows begin; None: all at 0.
    ends: the positions at which rows end; None: no row is padded on the right.
    short: whether the call is a decode step for rows that have keys.
    crossover: by phase, the number of keys from which a row is served by the method.
    groups: the rows whose state is stored together. No run and no entry of ``ended`` spans two groups.
    """
    if starts is None and ends is None and len(groups) == 1:  # all rows are alike
        phase = DECODE if short and past > 0 else PREFILL
        every = slice(0, batch)
        runs = [Run(every, phase, total < crossover.get(phase, 0))] if total > 0 else []
        return Served(runs, [every] if runs and phase == PREFILL else [])
    holder = [place for place, group in enumerate(groups) for _ in group]
    kinds: list[tuple[str, bool, int] | None] = []
    ended: list[int | None] = []
    for row, first in enumerate(starts or [0] * batch):
        phase = DECODE if short and first < past else PREFILL
        below = (ends[row] if ends else total) - first < crossover.get(phase, 0)
        begun = first < total
        kinds.append((phase, below, holder[row] if phase == DECODE else 0) if begun else None)
        # In a long call, rows without a token end with the other rows, so that the batch stays one group.
        ended.append(holder[row] if phase == PREFILL and (begun or not short) else None)
    if not any(kinds):
        return Served([], [])
    return Served(
        [Run(rows, phase, below) for (phase, below, _), rows in _neighbours(kinds)],
        [rows for _, rows in _neighbours(ended)],
    )


def _neighbours(kinds: Sequence[Kind | None]) -> list[tuple[Kind, slice]]:
    """(kind, rows) of neighbouring rows of one kind, without the rows whose kind is None."""
    found, at = [], 0
    for kind, rows in groupby(kinds):
        begin, at = at, at + len(list(rows))
        if kind is not None:
            found.append((kind, slice(begin, at)))
    return found


def joined(done: list[Done], q: Tensor, value_dim: int) -> Partial:
    """The Partials of all runs as one, for the queries q [B, H, Tq, D]; (0, -inf) in rows without a run."""
    if len(done) == 1 and done[0].run.size == q.shape[0]:
        return done[0].part
    whole = empty_partial(q, value_dim)
    for run, part, *_ in done:
        whole.out[run.rows], whole.lse[run.rows] = part.out.to(q.dtype), part.lse.to(whole.lse.dtype)
    return whole


def total_reads(done: Sequence[Done]) -> Reads:
    """The sum of what all runs have read, with the first fallback reason among them."""
    if len(done) == 1:
        return done[0].reads
    total = Reads()
    for _, _, reads, *_ in done:
        total += reads
        total.reason = total.reason or reads.reason
    return total
