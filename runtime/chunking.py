"""The cuts of a long prefill call. They keep the result of a row in a padded batch equal to its result
alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..attention.attend import DECODE_ROWS


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How ``prefill_chunk`` cuts calls.

    tokens: tokens of a chunk, a multiple of ``block_multiple``.
    block_multiple: a cut within a row lies at a multiple of this number of the row's tokens.
    by_prompt: whether a method selects by the last queries of a chunk. Then a row must be cut exactly where
    it would be cut alone, or not at all.
    """

    tokens: int
    block_multiple: int = 1
    by_prompt: bool = False

    @property
    def step(self) -> int:
        """Two rows can have the same cuts if their first tokens are a multiple of ``step`` tokens apart."""
        return self.tokens if self.by_prompt else self.block_multiple

    def fits(self, length: int) -> bool:
        """Whether a call of ``length`` tokens is not cut. A cut must leave more than DECODE_ROWS tokens,
        since a shorter rest would be a decode step."""
        return length <= self.tokens + DECODE_ROWS

    def cuts(self, begins: Sequence[int], length: int) -> list[int]:
        """The cuts of a call of ``length`` tokens for which ``fits`` is false, ascending. begins: for each
        row, the token of the call at which the row begins (0: at the first token or in an earlier call).

        Chunks are counted from the first token of the row that begins first. There is no cut after the first
        row that does not begin at a multiple of ``block_multiple``: the rest is one call.

            tokens = 4, block_multiple = 2      row   x x x x|x x x x|x x x x x x x x
                                               . . . . . . x x|x x x x x x x x
                                               . . . . . . . . . x x x x x x x     no cut fits this row
        """
        begins = sorted({begin for begin in begins if begin < length} or {0})
        first = begins[0]
        cuts = [x for x in self._alone(first % self.tokens - self.tokens, length) if x > 0]
        if self.by_prompt:
            if any([x for x in cuts if x > begin] != self._alone(begin, length) for begin in begins):
                cuts = []
        else:
            limit = next((begin for begin in begins if (begin - first) % self.step), length)
            cuts = [x for x in cuts if x <= limit]
            last = first + (limit - first) // self.step * self.step
            if limit < length and min(last - max([0, *cuts]), length - last) > DECODE_ROWS:
                cuts.append(last)
        return cuts

    def _alone(self, begin: int, length: int) -> list[int]:
        """The cuts of a row that begins at ``begin`` and is alone in the batch."""
        return list(range(begin + self.tokens, length - DECODE_ROWS, self.tokens))


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Where a prompt may be cut into two calls so that its answer is that of one call. Then the cache of its
    beginning can be reused.

    step: a cut lies at a multiple of this number of tokens. rest: the second call has at least so many.
    never: why there is no such cut; "" where there are some.
    """

    step: int = 1
    rest: int = DECODE_ROWS + 1
    never: str = ""

    def longest(self, length: int) -> int:
        """The last cut of a prompt of ``length`` tokens; 0 where it has none."""
        return 0 if self.never else self.aligned(max(length - self.rest, 0))

    def aligned(self, length: int) -> int:
        """The last cut at or before ``length``."""
        return length - length % self.step
