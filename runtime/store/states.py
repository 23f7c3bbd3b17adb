"""The state that methods keep of the rows of a batch between calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch

from ...attention.keys import State


@dataclass(eq=False)
class _Group:
    """Neighbouring rows whose state is stored together. states: by method. seen: by method, the number of
    positions of the sequence after its last call."""

    rows: range
    states: dict[str, State] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def of(self, rows: Sequence[int], at: int) -> _Group:
        """A group of the rows from ``at`` on, with the state of ``rows``: rows of this group, in any
        order."""
        local = torch.tensor([row - self.rows.start for row in rows])
        states = {
            name: {key: x.index_select(0, local.to(x.device)) for key, x in state.items()}
            for name, state in self.states.items()
        }
        return _Group(range(at, at + len(rows)), states, dict(self.seen))


class States:
    """The state of each method, by groups of neighbouring rows.

    At first all rows are one group. A group is split when some of its rows are served separately or lose
    their state. States of different groups may differ in size, so groups are not joined again while any state
    is stored.
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []

    def groups(self, batch: int) -> list[range]:
        """The groups of the ``batch`` rows."""
        if len(self._groups) == 1 and len(self._groups[0].rows) == batch:
            return [self._groups[0].rows]
        if not any(state for group in self._groups for state in group.states.values()):
            self._groups = [_Group(range(batch))]
        return [group.rows for group in self._groups]

    def of(self, name: str, rows: slice, past: int, total: int) -> State:
        """The state of the method ``name`` for neighbouring rows of one group, in a call that extends the
        sequence from ``past`` to ``total`` positions. It is empty if positions were appended since the last
        call of the method."""
        group = self._apart(range(rows.start, rows.stop))
        if group.seen.get(name) not in (past, total):
            group.states.pop(name, None)
        group.seen[name] = total
        return group.states.setdefault(name, {})

    def drop(self, rows: Iterable[int]) -> None:
        """Drop the state of some rows, for every method."""
        for row in rows:
            if self._groups:
                self._apart(range(row, row + 1)).states.clear()

    def clear(self) -> None:
        """Drop the state of all rows."""
        self._groups = []

    def held(self) -> list[dict[str, Any]]:
        """The groups with their states, for ``restore``."""
        return [
            {"rows": (g.rows.start, g.rows.stop), "states": g.states, "seen": g.seen} for g in self._groups
        ]

    def restore(self, held: Iterable[Mapping[str, Any]]) -> None:
        """Take over the states that another store held."""
        self._groups = [_Group(range(*group["rows"]), group["states"], group["seen"]) for group in held]

    def map_rows(self, rows: Sequence[int]) -> None:
        """Give row i the state that row ``rows[i]`` had."""
        groups, at = [], 0
        for group, some in groupby(rows, key=self._holder):
            if group is not None:
                groups.append(group.of(list(some), at))
                at = groups[-1].rows.stop
        self._groups = groups

    def _holder(self, row: int) -> _Group | None:
        return next((group for group in self._groups if row in group.rows), None)

    def _apart(self, rows: range) -> _Group:
        """The group of exactly these rows; the group that contains them is split where needed."""
        holder = self._groups[0] if len(self._groups) == 1 else self._holder(rows.start)
        assert holder is not None and rows.stop <= holder.rows.stop, "a run lies in one group"
        if holder.rows == rows:
            return holder
        edges = (holder.rows.start, rows.start, rows.stop, holder.rows.stop)
        parts = [holder.of(range(a, b), a) for a, b in pairwise(edges) if a < b]
        place = self._groups.index(holder)
        self._groups[place : place + 1] = parts
        return next(part for part in parts if part.rows == rows)
