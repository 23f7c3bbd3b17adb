"""SALE's calibration: each query head's threshold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from ..errors import FarspanError
from ..keys import Keys
from ..kv import KV
from ..method import LayerInfo
from ..needs import Inputs, Needs
from ..ops.block_sparse import block_sparse
from ..ops.flash import flash
from ..partial import add_sinks
from ..selection import BlockIndex
from ..softmax import Softmax


class _Method(Protocol):
    """What the search needs of SALE, whose file imports this one."""

    dense_threshold: ClassVar[float]

    @property
    def block_q(self) -> int: ...
    @property
    def block_k(self) -> int: ...
    @property
    def local(self) -> int: ...
    @property
    def dense_below(self) -> int: ...
    @property
    def q_bits(self) -> int | None: ...
    def with_thresholds(self, tau: Tensor) -> Self: ...
    def estimate(self, q: Tensor, keys: Keys) -> Tensor: ...
    def keep(self, largest: Tensor, keys: Keys) -> BlockIndex: ...


class ThresholdSearch:
    """``thresholds`` [H] float32, one per query head, 0 for a dense one: the largest that are small enough in
    every window of a text."""

    needs = Needs()

    def __init__(self, method: _Method, layer: LayerInfo, start: float, error: float) -> None:
        if not all(isinstance(x, int | float) and 0 < x < math.inf for x in (start, error)):
            raise FarspanError(
                f"sale takes start and error, finite numbers above 0; got start={start!r}, error={error!r}."
            )
        self.settings: dict[str, Any] = {
            "start": start,
            "error": error,
            "block_q": method.block_q,
            "block_k": method.block_k,
            "local": method.local,
            "q_bits": method.q_bits,
        }
        self._method, self._error = method, error
        self._tau = torch.full((layer.num_heads,), start, dtype=torch.float64)
        self._seen: bool | None = None

    def observe(
        self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, inputs: Inputs | None = None
    ) -> None:
        if softmax.window is not None:
            return  # a layer with a sliding window is not patched
        # Queries that read everything whatever the thresholds are do not count.
        skip = self._method.dense_below // self._method.block_q * self._method.block_q
        if q.shape[2] <= max(self._method.dense_below, self._method.local, self._method.block_k):
            self._seen = self._seen or False
            return
        self._seen = True
        keys = Keys(kv=KV(k, v), tq=q.shape[2], softmax=softmax)
        dense, sinks = flash(q, keys.kv, softmax), softmax.sinks
        if sinks is not None:
            dense = add_sinks(dense, sinks)
        largest, looking = self._method.estimate(q, keys), self._tau > 0
        while bool(looking.any()):
            index = self._method.with_thresholds(self._tau).keep(largest, keys)
            index = replace(index, counts=index.counts.masked_fill(~looking.to(q.device)[:, None], 0))
            part = block_sparse(q, keys.kv, index, softmax, check=False)
            if sinks is not None:
                part = add_sinks(part, sinks)
            off = (part.out.float() - dense.out.float())[0, :, skip:].abs().sum(-1).mean(-1).cpu()
            looking &= off >= self._error
            self._tau[looking] /= 2
            looking &= self._tau > self._method.dense_threshold
        self._tau[self._tau <= self._method.dense_threshold] = 0

    def weights(self) -> dict[str, Tensor]:
        if self._seen is False:
            raise FarspanError(
                f"sale is dense in windows of up to {self._method.dense_below} tokens and found no "
                "thresholds: give a longer text, more tokens or a larger window."
            )
        return {"thresholds": self._tau.float()}
