"""What a method reads by its own declaration: keys per query, and bytes to select them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .summary import Summary, count_entries, entry_bytes

PREFILL, DECODE = "prefill", "decode"
_EXACT = 1 << 15  # queries of a prompt that are all counted; of a longer prompt as many are sampled


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layer reads in a phase at a length.

    Prefill is one call with ``length`` queries and an empty cache. Decode is one query that sees ``length``
    keys, its own included.

    keys: keys that one query of one head attends to, the mean over the queries. dense: the same for dense
    attention. last: keys of the last query. selection: bytes read to select, divided by the bytes of K and V
    of ``length`` keys. candidates: single keys of a KV head that each rank offers for a global cut.
    period: decode repeats after this many steps; ``keys``, ``selection`` and ``candidates`` are then means
    over a period whose last step sees ``length`` keys. reach: where a query reads nothing but the first and
    the last keys of its row, the number of keys in these two stretches at most; None: it may read any key.
    exact: whether ``keys`` follows from the parameters. If not, it depends on the data, and ``keys`` is the
    most that can be read.
    """

    keys: float
    dense: float
    last: float
    selection: float = 0.0
    candidates: float = 0.0
    period: int = 1
    reach: int | None = None
    exact: bool = True

    @property
    def density(self) -> float:
        """Pairs over causal pairs, as the report gives it."""
        return self.keys / self.dense


@dataclass(frozen=True, kw_only=True)
class Queries:
    """The queries whose reading a method declares.

    head_dim, element_size: numbers of a key, and bytes of a number.
    """

    phase: str
    length: int
    head_dim: int = 128
    element_size: int = 2

    @cached_property
    def seen(self) -> Tensor:
        """[N] int64, ascending: how many keys each query sees; ``length`` is the last entry. Of a prompt
        longer than 32,768 tokens the queries are a sample, one from each of 32,768 equal stretches."""
        n = self.length
        if self.phase == DECODE:
            return torch.tensor([n])
        if n <= _EXACT:
            return torch.arange(1, n + 1)
        steps = torch.arange(_EXACT, dtype=torch.float64)
        within = (steps * 0.6180339887498949).frac()  # evenly spread, and in step with no block size
        places = ((steps + within) * (n / _EXACT)).long() + 1
        places[-1] = n
        return places

    def cost(
        self,
        keys: Tensor | None = None,
        *,
        selection: float = 0.0,
        candidates: float = 0.0,
        period: int = 1,
        reach: int | None = None,
        exact: bool = True,
    ) -> Cost:
        """The declaration, from the ``keys`` [N] that each of ``seen`` reads; None: all of them."""
        keys = self.seen if keys is None else torch.minimum(keys, self.seen)
        return Cost(
            keys=float(keys.double().mean()),
            dense=float(self.seen.double().mean()),
            last=float(keys[-1]),
            selection=selection,
            candidates=candidates,
            period=period,
            reach=reach,
            exact=exact,
        )

    def of_blocks(self, size: int | Tensor, first: Tensor, last: Tensor, block: int) -> Tensor:
        """[N]: keys that each query sees of the ``size`` key blocks that its query block reads. Those are the
        blocks ``first`` .. ``last`` [N], which end at or after the query, and others before them."""
        near = last - first + 1
        size = torch.maximum(torch.as_tensor(size), near).minimum(last + 1)
        return self.seen - first * block + (size - near) * block

    def raw_keys(self, count: float) -> float:
        """``selection`` of reading ``count`` keys whole, without their values."""
        return count / (2 * self.length)

    def entries(self, *summaries: Summary) -> float:
        """``selection`` of reading every entry of ``summaries`` once."""
        size = sum(
            count_entries(s, self.length) * entry_bytes(s, self.head_dim, self.element_size)
            for s in summaries
        )
        return size / (self.length * 2 * self.head_dim * self.element_size)
