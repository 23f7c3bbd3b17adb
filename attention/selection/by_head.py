"""A selection of its own for each of some KV heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..keys import Keys
from ..partial import Partial
from .base import Pairs, Selection


@dataclass(frozen=True, kw_only=True)
class ByHead(Selection):
    """KV heads that read by different selections, whose pairs the host knows.

    parts: KV heads, and the selection by which they read; every head is in one of the parts.
    """

    called: ClassVar[str] = "a ByHead"

    parts: tuple[tuple[tuple[int, ...], Selection], ...]

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        return self._run(q, keys, lambda part, q, keys: part.run_prefill(q, keys, rows, impl))

    def run_decode(self, q: Tensor, keys: Keys, impl: str) -> tuple[Partial, Pairs]:
        return self._run(q, keys, lambda part, q, keys: part.run_decode(q, keys, impl))

    def run_decode_here(self, q: Tensor, keys: Keys) -> tuple[Partial, Pairs]:
        return self._run(q, keys, lambda part, q, keys: part.run_decode_here(q, keys))

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        read = torch.zeros(len(starts), kv_heads, chunk[1], dtype=torch.bool, device=device)
        for heads, part in self.parts:
            read[:, list(heads)] = part.needed(chunk, starts, len(heads), device)
        return read

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        masks = [part.to_mask(tq, tk, start, batch, rows) for _, part in self.parts]
        whole = masks[0].new_zeros(masks[0].shape[0], self.mask_heads, *masks[0].shape[2:])
        for (heads, _), mask in zip(self.parts, masks, strict=True):
            whole[:, list(heads)] = mask
        return whole

    @property
    def mask_heads(self) -> int:
        return sum(len(heads) for heads, _ in self.parts)

    @property
    def reads_every_key(self) -> bool:
        return all(part.reads_every_key for _, part in self.parts)

    def _run(
        self, q: Tensor, keys: Keys, run: Callable[[Selection, Tensor, Keys], tuple[Partial, Pairs]]
    ) -> tuple[Partial, Pairs]:
        """``run`` of each part with its query heads and keys, joined in the order of the heads."""
        group, pairs = q.shape[1] // self.mask_heads, 0
        outs: dict[int, Tensor] = {}
        lses: dict[int, Tensor] = {}
        for heads, part in self.parts:
            mine = torch.cat([q[:, head * group : (head + 1) * group] for head in heads], 1)
            found, read = run(part, mine, keys.of_heads(heads))
            assert isinstance(read, int), f"the host does not know the pairs of {part.called}"
            outs.update(zip(heads, found.out.split(group, 1), strict=True))
            lses.update(zip(heads, found.lse.split(group, 1), strict=True))
            pairs += read
        out, lse = (torch.cat([x[head] for head in sorted(x)], 1) for x in (outs, lses))
        return Partial(out, lse), pairs
