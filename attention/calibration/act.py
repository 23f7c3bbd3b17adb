"""ACT's calibration: the heads whose attention is to be calibrated."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import FarspanError
from ..keys import Keys, State
from ..kv import KV
from ..method import LayerInfo
from ..needs import Inputs, Needs
from ..ops.flash import flash
from ..partial import add_sinks
from ..selection import Index, Rescaled
from ..selection.rescaled import attend_rescaled
from ..softmax import Softmax


class _Method(Protocol):
    """What the search needs of ACT, whose file imports this one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def beta(self) -> float: ...
    @property
    def threshold(self) -> float: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    def prepare_prefill(self, q: Tensor, keys: Keys) -> State: ...
    def select_prefill(self, q: Tensor, keys: Keys) -> Index: ...


class HeadSearch:
    """``heads`` [H] bool, those to calibrate, and ``effects`` [H] float32: to first order, the change of the
    mean negative log-likelihood, in nats per token, when that head alone is calibrated.

    To first order the change is the product of the change of the head's output and the gradient in it, summed
    over the window. One forward and one backward call give it for all heads of a model; the exact change
    would take one call per head.
    """

    needs = Needs()

    def __init__(self, method: _Method, layer: LayerInfo, sure: float) -> None:
        if not isinstance(sure, int | float) or not 0 <= sure < math.inf:
            raise FarspanError(f"act takes sure, a number of standard errors from 0 on; got sure={sure!r}.")
        self.settings: dict[str, Any] = {"sure": sure, "beta": method.beta, "threshold": method.threshold}
        self._method = replace(method, over=None, heads="all", chosen=None)
        self._sure, self._heads = sure, layer.num_heads
        self._served = method.first <= layer.index <= method.last
        self._change: Tensor | None = None  # of the window's output, [1, H, T, D]
        self._effects: list[Tensor] = []  # [H] of each window

    def observe(
        self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, inputs: Inputs | None = None
    ) -> None:
        self._change = None
        if softmax.window is not None or not self._served:
            return
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
        keys = Keys(kv=KV(k, v), tq=q.shape[2], softmax=softmax)
        keys.prepared = self._method.prepare_prefill(q, keys)
        index = self._method.select_prefill(q, keys)
        assert isinstance(index, Rescaled)
        plain = flash(q, keys.kv, softmax)
        changed = attend_rescaled(q, keys, index, "auto")
        if softmax.sinks is not None:
            plain, changed = (add_sinks(part, softmax.sinks) for part in (plain, changed))
        self._change = changed.out - plain.out

    def observe_grad(self, gradient: Tensor) -> None:
        if self._change is not None:
            self._effects.append((gradient.to(self._change) * self._change).sum((0, 2, 3)).double().cpu())

    def weights(self) -> dict[str, Tensor]:
        if not self._effects:
            return {"heads": torch.zeros(self._heads, dtype=torch.bool), "effects": torch.zeros(self._heads)}
        effects = torch.stack(self._effects)  # [windows, H]
        mean, count = effects.mean(0), len(effects)
        error = effects.std(0) / count**0.5 if count > 1 else torch.zeros_like(mean)
        return {"heads": mean < -self._sure * error, "effects": mean.float()}
