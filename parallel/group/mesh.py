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

_APART = "agree"  # the name of collectives that ``Mesh.sent`` leaves out
_SLOTS = 16  # int64 words of the row that each rank sends to be compared


@dataclass
class Mesh:
    """The ranks that share this rank's sequence.

    ranks: all of them. config: the configuration, with ``size`` and ``ulysses`` filled in. device: where the
    tensors of collectives are.
    ulysses, ring: the two groups of this rank for USP. Of rank r * U + u these are the ranks with the same r,
        and those with the same u. None for other mechanisms.
    watch: on every rank, raises one sentence when a rank fails.
    borrowed: the groups belong to another Mesh, which closes them.
    """

    ranks: Ranks
    ulysses: Ranks | None
    ring: Ranks | None
    config: ContextParallel
    device: torch.device
    watch: Watch
    borrowed: bool = False

    @property
    def size(self) -> int:
        """Ranks that share one sequence."""
        return self.ranks.size

    @property
    def rank(self) -> int:
        """The number of this rank among them."""
        return self.ranks.rank

    def sent(self) -> int:
        """Bytes that this rank has sent so far, without those of the methods below."""
        return sum(sum(r.sent.values()) - r.sent[_APART] for r in self.watch.groups)

    def agree(self, values: dict[str, Tensor | int | str | None]) -> None:
        """Check that every rank has the same values, tensors by dtype, shape and bits; one all-gather of 128
        bytes.

        values: at most 15, by the names that an error uses. Raises FarspanError with the values that differ
        and the ranks whose value is not the majority's (rank 0's, if there is no majority).
        """
        if len(values) >= _SLOTS:
            raise ValueError(f"{len(values)} values were given to agree; at most {_SLOTS - 1} are allowed")
        row = torch.zeros(_SLOTS, dtype=torch.int64)
        tensors: dict[int, Tensor] = {}
        row[0] = text_hash(repr(list(values)))  # other names: the ranks are in different calls
        for i, value in enumerate(values.values(), start=1):
            if isinstance(value, Tensor):
                tensors[i] = bit_hash(value)
                row[i] = text_hash(f"{value.dtype} {tuple(value.shape)}")
            else:
                row[i] = text_hash(f"{type(value).__name__} {value}")
        row = row.to(self.device)
        for i, tensor in tensors.items():
            row[i] ^= tensor.to(self.device)
        table = self.ranks.all_gather(row, _APART).tolist()
        columns = zip(("", *values), zip(*table, strict=True), strict=False)
        odd = {name: self._named(minority(column)) for name, column in columns if minority(column)}
        if "" in odd:  # the columns are not comparable
            raise FarspanError(
                f"{odd[''].capitalize()} came to another step than the other ranks. Every rank must make the "
                "same calls with the same options."
            )
        if odd:
            raise FarspanError(
                f"The ranks have different values: {', '.join(f'{n} on {r}' for n, r in odd.items())}. Every "
                "rank must be given the same inputs, options and seed."
            )

    def alike(self, *numbers: int) -> bool:
        """Whether every rank has given the same numbers."""
        table = self.ranks.all_gather(torch.tensor(numbers, device=self.device), _APART)
        return bool((table == table[0]).all())

    def largest(self, number: int) -> int:
        """The largest of the numbers that the ranks give."""
        return int(self.ranks.all_gather(torch.tensor([number], device=self.device), _APART).max())

    def share(self, data: bytes) -> bytes:
        """The bytes of rank 0, at least one, on every rank. What other ranks give does not count."""
        leads = self.rank == 0
        size = self.ranks.broadcast(torch.tensor([len(data)], device=self.device), 0, _APART)
        given = torch.frombuffer(bytearray(data), dtype=torch.uint8) if leads else None
        room = torch.empty(int(size), dtype=torch.uint8) if given is None else given
        sent = self.ranks.broadcast(room.to(self.device), 0, _APART)
        return data if leads else sent.cpu().numpy().tobytes()

    def _named(self, places: list[int]) -> str:
        return named([self.ranks.global_rank(place) for place in places])

    def close(self) -> None:
        """Leave the groups that ``join`` has made. The default group of the job stays."""
        if not self.borrowed:
            self.watch.close()
