"""The fused step of methods that read the keys with the largest estimates, within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .budget import budget_at
from .ops.estimate_topk import estimate_topk
from .partial import Partial
from .softmax import Softmax
from .static_step import StaticKeys, StaticStep, attend_listed


@dataclass(frozen=True, kw_only=True)
class TopKStep(StaticStep):
    """A step that reads ``k`` keys or a ``fraction`` of them, those that ``estimate_topk`` chooses. reduce:
    its argument of that name."""

    k: int | None
    fraction: float | None
    reduce: str

    def lists(self, num_heads: int, num_kv_heads: int) -> int:
        return num_heads if self.reduce == "none" else num_kv_heads

    def attend(self, q: Tensor, keys: StaticKeys, entries: Tensor, softmax: Softmax, **of: Any) -> Partial:
        """Attention of q [B, H, 1, D] over the keys that ``entries`` estimate as the largest. of: the
        ``page`` or the ``channels`` of the entries, as ``estimate_topk`` takes them."""
        lists = estimate_topk(
            q,
            entries,
            softmax,
            keys.length,
            self.k,
            fraction=self.fraction,
            reduce=self.reduce,
            start=keys.start,
            impl=keys.impl,
            **of,
        )
        return attend_listed(q, keys, lists, softmax)

    def read(self, seen: int) -> int:
        return min(seen, budget_at(self.k, self.fraction, seen))


def covers(k: int | None, fraction: float | None, keys: StaticKeys) -> bool:
    """Whether ``select_decode`` would answer None for the next token of a store of fixed size: the budget is
    one number for all rows, and covers them."""
    most, padded = max(keys.seen()), min(keys.seen()) <= keys.position()
    return (k is not None or not padded) and budget_at(k, fraction, most) >= most
