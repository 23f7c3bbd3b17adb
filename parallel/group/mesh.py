"""Mesh: the ranks that share one sequence, and the check that they have the same values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.errors import FarspanError
from .comm import Ranks
from .config import ContextParallel
from .digest import bit_hash, minority, text_hash
from .meeting import named
from .watch import Watch

_SLOTS = 16  # int64 words of the row that each rank sends to be compared


@dataclass
class Mesh:
    """The ranks that share this rank's sequence.

    ranks: all of them. config: with ``size`` and ``ulysses`` known. device: where collectives' tensors are.
    ulysses, ring: for USP, this rank's neighbours (rank r * U + u: those of the same r) and those across (of
        the same u); None for other mechanisms.
    watch: turns a failing rank into one sentence on all.
    lent: the groups are another one's, who closes them.
    """

    ranks: Ranks
    ulysses: Ranks | None
    ring: Ranks | None
    config: ContextParallel
    device: torch.device
    watch: Watch
    lent: bool = False

    @property
    def size(self) -> int:
        """Ranks that share one sequence."""
        return self.ranks.size

    @property
    def rank(self) -> int:
        """This one's place among them."""
        return self.ranks.rank

    def sent(self) -> int:
        """Bytes that this rank has sent so far, what it takes to ``agree`` left out."""
        return sum(sum(r.sent.values()) - r.sent["agree"] for r in self.watch.groups)

    def agree(self, values: dict[str, Tensor | int | str | None]) -> None:
        """That every rank has the same values, dtype, shape and bits: one all-gather of 128 bytes.

        values: at most 15, by the name that an error calls them. FarspanError says which of them differ, and
        on which ranks from the majority (from rank 0's, if there is none).
        """
        if len(values) >= _SLOTS:
            raise ValueError(f"{len(values)} values to agree on, at most {_SLOTS - 1} fit")
        row = torch.zeros(_SLOTS, dtype=torch.int64)
        tensors: dict[int, Tensor] = {}
        row[0] = text_hash(repr(list(values)))  # ranks at different places of the program have other names
        for i, value in enumerate(values.values(), start=1):
            if isinstance(value, Tensor):
                tensors[i] = bit_hash(value)
                row[i] = text_hash(f"{value.dtype} {tuple(value.shape)}")
            else:
                row[i] = text_hash(f"{type(value).__name__} {value}")
        row = row.to(self.device)
        for i, tensor in tensors.items():
            row[i] ^= tensor.to(self.device)
        table = self.ranks.all_gather(row, "agree").tolist()
        columns = zip(("", *values), zip(*table, strict=True), strict=False)
        odd = {name: self._named(minority(column)) for name, column in columns if minority(column)}
        if "" in odd:  # the columns are not comparable
            raise FarspanError(
                f"{odd[''].capitalize()} came to another step than the other ranks: every rank must make the "
                "same calls with the same options."
            )
        if odd:
            raise FarspanError(
                f"The ranks have different values: {', '.join(f'{n} on {r}' for n, r in odd.items())}. Every "
                "rank must be given the same inputs, options and seed."
            )

    def _named(self, places: list[int]) -> str:
        return named([self.ranks.global_rank(place) for place in places])

    def close(self) -> None:
        """Leave the groups that ``join`` has made. The job's own group stays."""
        if not self.lent:
            self.watch.close()
