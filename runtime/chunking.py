"""Where a long prefill call is cut, so that a row of a padded batch gives what it gives alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..attention.attend import DECODE_ROWS


@dataclass(frozen=True, kw_only=True)
class Chunking:
    """How ``prefill_chunk`` cuts calls. tokens: of a chunk, whole multiples of ``block_multiple``;
    block_multiple: a cut within a row lies at a multiple of so many of its tokens. by_prompt: a method
    selects by the chunk's last queries, so that a row is cut exactly where it is cut alone, or not at all."""

    tokens: int
    block_multiple: int = 1
    by_prompt: bool = False

    @property
    def step(self) -> int:
        """Two rows fit each other where their first tokens are a multiple of so many tokens apart."""
        return self.tokens if self.by_prompt else self.block_multiple

    def fits(self, length: int) -> bool:
        """Whether a call of ``length`` tokens stays whole: no cut leaves so short a rest that it would be a
        decode step."""
        return length <= self.tokens + DECODE_ROWS

    def cuts(self, begins: Sequence[int], length: int) -> list[int]:
        """Where to cut a call of ``length`` tokens that does not fit, ascending; rows begin at its tokens
        ``begins`` (0: with the call or before it).

        Chunks are counted from the first row's first token. The cutting ends with a row that does not begin
        at a multiple of ``block_multiple``: the rest is one call.

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
        """Where a row that begins at ``begin`` is cut if it is alone."""
        return list(range(begin + self.tokens, length - DECODE_ROWS, self.tokens))
