"""Calls that every rank of a patched model makes because rank 0 makes them."""

from __future__ import annotations

import pickle
from typing import Any

import torch

from ...parallel.group.mesh import Mesh

_APART = "agree"  # collectives of this name are not counted in Mesh.sent


class OverRanks:
    """Sends values of rank 0, which has the clients, to the other ranks, which follow."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self._mesh.rank == 0

    def share(self, value: Any = None) -> Any:
        """The value of rank 0, on every rank. Raises FarspanError where a rank has failed."""
        data = pickle.dumps(value) if self.leads else b""
        size = self._broadcast(torch.tensor([len(data)]))
        room = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if self.leads
            else torch.empty(int(size), dtype=torch.uint8)
        )
        sent = self._broadcast(room)
        return value if self.leads else pickle.loads(sent.cpu().numpy().tobytes())

    def _broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return self._mesh.ranks.broadcast(x.to(self._mesh.device), 0, _APART)
