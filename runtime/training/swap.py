"""Parts of a model that are exchanged for trained ones, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


class Swap:
    """Attributes of modules (parameters or modules) that are exchanged and exchanged back."""

    def __init__(self, places: Sequence[tuple[nn.Module, str]]) -> None:
        self.places = places
        self._before = [getattr(module, name) for module, name in places]
        self._after = self._before

    def taken(self) -> None:
        """The present values are the new ones."""
        self._after = [getattr(module, name) for module, name in self.places]

    def original(self) -> None:
        self._put(self._before)

    @contextmanager
    def originals(self) -> Iterator[None]:
        """A context with the old values in place."""
        self._put(self._before)
        try:
            yield
        finally:
            self._put(self._after)

    def _put(self, values: list[Any]) -> None:
        for (module, name), value in zip(self.places, values, strict=True):
            setattr(module, name, value)


def place_of(root: nn.Module, target: str) -> tuple[nn.Module, str]:
    """The parent of the part ``target`` of ``root``, and the name of the part in it."""
    parent, _, name = target.rpartition(".")
    return root.get_submodule(parent), name
