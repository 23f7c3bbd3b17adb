"""What a scorer of passages is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

Ids = Sequence[int]
"""Token ids."""


class Scored(NamedTuple):
    """scores: of each passage; a higher one is kept first. read: tokens that the scorer has read."""

    scores: list[float]
    read: int


class Scorer(Protocol):
    """Scores passages by how much a query needs them."""

    @property
    def name(self) -> str: ...

    def __call__(self, opening: Ids, passages: Sequence[Ids], query: Ids) -> Scored:
        """opening: the tokens with which the prompt begins. passages: at least one, each with a token.
        Raises FarspanError where they do not fit into the model's positions."""
        ...
