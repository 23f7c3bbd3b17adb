"""The steps of ``recycled`` on a store of fixed size. Their schedule is a clock on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import topk_positions
from ..gqa import group_scores
from ..kv import KV
from ..lists import TokenLists
from ..ops.append import Kept
from ..ops.decode import decode
from ..ops.scores import scores
from ..partial import Partial
from ..softmax import Softmax
from ..static_step import EveryKeyStep, StaticKeys, StaticStep, attend_listed, store
from .kept_set import pooled


def next_step(keys: StaticKeys, k: int, stride: int, gqa_reduce: str, pool: int) -> StaticStep | None:
    """The step of the next token, where it is the same for all rows; None also where rows have no set yet."""
    if max(keys.seen()) <= k:
        return EveryKeyStep()
    clock = keys.state.get("clock")
    if clock is None or min(keys.seen()) <= k:
        return None
    since = clock.numpy()  # [B, Hkv] on the host, steps since the last full one
    steps = int(since.max())
    if steps < 0 or (since != steps).any():
        return None
    return KeptSetStep(k=k) if steps + 1 < stride else FullStep(k=k, reduce=gqa_reduce, pool=pool)


@dataclass(frozen=True, kw_only=True)
class KeptSetStep(StaticStep):
    """Between two full steps: every row reads its set of k keys, which the new token enters."""

    name: ClassVar[str] = "kept set"

    k: int

    def begin(self, keys: StaticKeys) -> None:
        clock = keys.state["clock"]
        clock += 1
        keys.set_number("since", keys.position() - int(clock.numpy().max()))

    def run(self, q: Tensor, keys: StaticKeys, softmax: Softmax) -> Partial:
        tokens, kv = keys.state["tokens"], KV(keys.state["k"], keys.state["v"])
        store(keys, kept=Kept(tokens, kv, keys.number("since")))
        return attend_listed(q, keys, TokenLists(tokens=tokens[:, :, None], gathered=kv), softmax)

    def read(self, seen: int) -> int:
        return self.k


@dataclass(frozen=True, kw_only=True)
class FullStep(StaticStep):
    """Every row reads every key, and its set becomes the k keys with the highest attention."""

    name: ClassVar[str] = "full"
    scores_keys: ClassVar[bool] = True

    k: int
    reduce: str
    pool: int

    def begin(self, keys: StaticKeys) -> None:
        keys.state["clock"].zero_()

    def run(self, q: Tensor, keys: StaticKeys, softmax: Softmax) -> Partial:
        store(keys)
        tokens = self._choose(q, keys, softmax)
        fresh = {"tokens": tokens, "q": q[:, :, 0]}
        fresh["k"], fresh["v"] = keys.buffers.gather(tokens).dense()
        for name, x in fresh.items():
            keys.state[name].copy_(x)
        return decode(q, keys.buffers, softmax, start=keys.start, length=keys.length, impl=keys.impl)

    def _choose(self, q: Tensor, keys: StaticKeys, softmax: Softmax) -> Tensor:
        """[B, Hkv, k], highest first. On a GPU the whole buffer is scored and what is no key of the row is
        masked, so that nothing waits for the length."""
        k, start = keys.buffers.k, keys.start
        on_cpu = k.device.type == "cpu"
        k = k[:, :, : int(keys.length)] if on_cpu else k
        places = torch.arange(k.shape[2], device=k.device)
        valid = None if on_cpu else places < keys.length
        if start is not None:
            begun = places >= start[:, None]
            valid = begun if valid is None else begun & valid
        valid = None if valid is None else valid.view(-1, 1, len(places))  # [B or 1, 1, N]
        ranked = group_scores(scores(q, k, softmax), valid, self.reduce)[:, :, 0]
        return topk_positions(pooled(ranked, self.pool, valid), self.k)
