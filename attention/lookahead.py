"""How many later tokens may take part in a method's selection for a query."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Lookahead:
    """tokens: a query's selection may depend on up to this many tokens after it; inf: on all later tokens of
    the call."""

    tokens: float = 0

    @staticmethod
    def of_block(block_q: int) -> Lookahead:
        """For one selection per block of ``block_q`` queries: the first of them looks at the last."""
        return Lookahead(block_q - 1)

    @staticmethod
    def prompt() -> Lookahead:
        """For a selection by the last queries of a call."""
        return Lookahead(math.inf)

    @property
    def is_prompt(self) -> bool:
        return math.isinf(self.tokens)

    def __str__(self) -> str:
        """A number of tokens, or "prompt"."""
        return "prompt" if self.is_prompt else f"{self.tokens:.0f}"
