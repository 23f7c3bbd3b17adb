"""Recycled Attention (RefreshKV): most steps attend to a small set that an occasional full step refreshes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import require
from ..cost import Cost, Queries
from ..errors import SpecError
from ..keys import Keys
from ..kv import KV
from ..method import AttentionMethod
from ..selection import Index, TokenIndex
from ..static_step import StaticKeys, StaticStep
from .kept_set import choose, drifted, enter, replace_sets
from .steps import next_step


@dataclass(frozen=True, kw_only=True)
class Recycled(AttentionMethod):
    """Full attention every ``stride`` steps; between, only the k keys that step attended to most
    (2411.05787).

    Prefill is dense, and its last query chooses the first set: the top k keys per layer and KV head by that
    query's attention, combined over the group's heads by ``gqa_reduce``. A recycled step reads the set alone.
    The new token enters the set in place of the lowest-ranked key that is left and, once all k have been
    replaced, of the oldest newcomer. A full step reads everything, generated tokens included, and chooses the
    set anew.

    dynamic=true replaces the stride by the query-similarity schedule: every ``qc`` steps the query is
    compared with that of the last full step by cosine, and a mean below ``s`` makes the step full. The mean
    is over the heads of a layer (scope=layer, the paper's) or of a KV head (scope=kv_head), whose set is then
    refreshed alone.

    pool=p ranks a key by the highest attention among the p positions around it (SnapKV's pooling,
    2404.14469), so that the neighbours of an attended key are read too; 1, the default, is the paper's plain
    top k.

    The set's keys and values are stored side by side: a recycled step reads k rows alone (each rank its part,
    in place). This saves reads, not memory. After a crop the next step is full.
    """

    name: ClassVar[str] = "recycled"
    title: ClassVar[str] = "Recycled Attention (RefreshKV)"
    paper: ClassVar[str] = "2411.05787"

    k: int = 4096
    stride: int = 50
    dynamic: bool = False
    qc: int = 5
    s: float = 0.8
    gqa_reduce: str = "sum"
    scope: str = "layer"
    pool: int = 1

    def __post_init__(self) -> None:
        require(self, k=(1, None), stride=(1, None), qc=(1, None), s=(-1.0, 1.0))
        require(self, gqa_reduce=("sum", "max"), scope=("layer", "kv_head"))
        if not isinstance(self.pool, int) or self.pool < 1 or self.pool % 2 == 0:
            raise SpecError(f"recycled takes an odd pool of at least 1 position; got {self.pool!r}.")

    @property
    def couples_heads(self) -> bool:
        return self.dynamic and self.scope == "layer"

    def reads(self, queries: Queries) -> Cost:
        """The mean over the steps up to a full one, that one included. By dynamic=true a full step may come
        every ``qc`` steps, and is counted as if it always did."""
        length, steps = queries.length, self.qc if self.dynamic else self.stride
        if length <= self.k:
            return queries.cost()
        return queries.cost(
            (queries.seen.double() + (steps - 1) * self.k) / steps,
            selection=queries.raw_keys(length) / steps,
            candidates=self.k / steps,
            period=steps,
            exact=not self.dynamic,
        )

    def on_prefill_end(self, q: Tensor, keys: Keys) -> None:
        keys.state.clear()
        if keys.longest() > self.k:
            self._refresh(q[:, :, -1:], keys, keys.length, torch.ones(keys.kv.shape[:2], dtype=torch.bool))

    def select_decode(self, q: Tensor, keys: Keys) -> Index:
        if keys.longest() <= self.k:
            keys.state.clear()
            return None
        tokens, full, shape = [], [], keys.kv.shape[:2]
        for t in range(keys.tq):
            full.append(self._step(q[:, :, t : t + 1], keys, keys.past + t + 1))
            chosen = keys.state.get("tokens")
            if chosen is None:  # no row is longer than the set yet
                chosen = torch.zeros(*shape, self.k, dtype=torch.long, device=q.device)
            tokens.append(chosen[:, :, None].clone() if keys.tq > 1 else chosen[:, :, None])
        some = next((x for x in full if x is not None), None)
        whole = [torch.zeros_like(some) if x is None else x for x in full] if some is not None else []
        return TokenIndex(
            tokens=torch.cat(tokens, 2) if keys.tq > 1 else tokens[0],
            full=torch.stack(whole, 2) if whole else None,
            gathered=KV(keys.state["k"], keys.state["v"]) if keys.tq == 1 and keys.peers is None else None,
        )

    def _step(self, q: Tensor, keys: Keys, length: int) -> Tensor | None:
        """Advance every row by one token, the ``length``-th. -> [B, Hkv] bool, on the host: which KV heads of
        which rows read everything; None: none do."""
        clock = keys.state.get("clock")  # [B, Hkv] steps since the last full one, on the host; -1: no set yet
        longest = length - min(keys.starts or [0])
        if longest <= self.k or clock is None:
            full = torch.ones(keys.kv.shape[:2], dtype=torch.bool)
            keys.state.clear()
            if longest > self.k:
                self._refresh(q, keys, length, full)
            return full
        clock += 1
        ages = clock.tolist()
        # A short row of a padded batch has nothing to leave out yet.
        short = [b for b, first in enumerate(keys.starts or ()) if length - first <= self.k]
        if not self.dynamic and not short and all(0 < age < self.stride for row in ages for age in row):
            enter(keys, length - 1, self.k, ages)
            return None
        again = drifted(q, keys, clock, self.qc, self.s, self.scope) if self.dynamic else clock >= self.stride
        full = again | (clock <= 0)
        full[short] = True
        if not bool(full.all()):
            enter(keys, length - 1, self.k, ages)
        if not bool(full.any()):
            return None
        self._refresh(q, keys, length, full)
        return full

    def _refresh(self, q: Tensor, keys: Keys, length: int, full: Tensor) -> None:
        """Choose the set of the (row, KV head) pairs in ``full`` anew, by the attention of q [B, H, 1, D]."""
        tokens = choose(q, keys, length, self.k, self.gqa_reduce, self.pool)
        replace_sets(q, keys, length, tokens, full)

    @property
    def has_static_step(self) -> bool:
        return not self.dynamic

    def static_step(self, keys: StaticKeys) -> StaticStep | None:
        return next_step(keys, self.k, self.stride, self.gqa_reduce, self.pool)
