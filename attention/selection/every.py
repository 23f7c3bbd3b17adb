"""Every visible key: dense attention, and the meaning of the answer None."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..causal import causal_mask, causal_pairs
from ..keys import Keys
from ..ops.decode import decode
from ..ops.flash import flash
from ..partial import Partial
from .base import Index, Pairs, Selection, refusal
from .here import attend_recent, count_visible


@dataclass(frozen=True, kw_only=True)
class EveryKey(Selection):
    """Every key that the query sees."""

    called: ClassVar[str] = "None"
    dense: ClassVar[bool] = True

    def run_prefill(self, q: Tensor, keys: Keys, rows: range, impl: str) -> tuple[Partial, Pairs]:
        part = flash(q, keys.kv, keys.softmax, start=keys.start, impl=impl)
        return part, every_pair(q, keys, rows)

    def run_decode(self, q: Tensor, keys: Keys, impl: str) -> tuple[Partial, Pairs]:
        part = decode(q, keys.kv, keys.softmax, start=keys.start, impl=impl)
        return part, every_pair(q, keys, range(keys.tq))

    def run_decode_here(self, q: Tensor, keys: Keys) -> tuple[Partial, Pairs]:
        return attend_recent(q, keys, None), int(count_visible(keys).sum()) * q.shape[1]

    def needed(
        self, chunk: tuple[int, int], starts: list[int], kv_heads: int, device: torch.device
    ) -> Tensor:
        first = torch.tensor(starts, device=device)[:, None]
        valid = torch.arange(chunk[1], device=device) >= first
        return valid[:, None].expand(-1, kv_heads, -1)

    def to_mask(
        self, tq: int, tk: int, start: Tensor | None = None, batch: int = 1, rows: Tensor | None = None
    ) -> Tensor:
        return causal_mask(tq, tk, start, batch, None if rows is None else rows.device, rows)


_EVERY = EveryKey()


def every_pair(q: Tensor, keys: Keys, rows: range) -> int:
    """The causal (query head, key) pairs of the queries ``rows`` of the call, summed over the batch."""
    b, h = q.shape[:2]
    return causal_pairs(len(rows), keys.past + rows.stop, keys.starts, b) * h


def dense_pairs(q: Tensor, keys: Keys, rows: range) -> int:
    """The pairs of ``every_pair``, and those with keys that were evicted."""
    return every_pair(q, keys, rows) + sum(keys.evicted or ()) * len(rows) * q.shape[1]


def as_selection(answer: Index, phase: str) -> Selection:
    """The answer of ``select_<phase>`` as a selection: None becomes ``EveryKey``.

    Raises TypeError for an answer that cannot run in ``phase``.
    """
    if answer is None:
        return _EVERY
    if not isinstance(answer, Selection) or not answer.serves(phase):
        raise refusal(phase, answer)
    return answer
