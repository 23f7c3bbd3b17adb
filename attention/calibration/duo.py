"""DuoAttention's heads: which of a model's KV heads stream, and two ways to learn it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..keys import Keys
from ..kv import KV
from ..method import LayerInfo
from ..needs import Inputs, Needs
from ..ops.flash import flash
from ..partial import Partial, add_sinks
from ..selection.window import Window
from ..softmax import Softmax


def streaming_heads(tensors: Mapping[str, Tensor], share: float) -> dict[int, Tensor]:
    """By layer, [Hkv] bool: the ``share`` of all KV heads with the lowest alphas. Of equals, those of lower
    layers come first, then lower heads. tensors: ``layers.<index>.alpha`` [Hkv] of every layer."""
    found = {int(name.split(".")[1]): x for name, x in tensors.items() if name.endswith(".alpha")}
    layers = sorted(found)
    alphas = torch.cat([found[layer].cpu().double() for layer in layers])
    chosen = torch.zeros(len(alphas), dtype=torch.bool)
    chosen[alphas.argsort(stable=True)[: round(share * len(alphas))]] = True
    return dict(zip(layers, chosen.split([len(found[layer]) for layer in layers]), strict=True))


class StreamingError:
    """``alpha`` [Hkv] float32: how far the output of a KV head's query heads changes where it streams,
    |streaming - full| / |full| over the queries that then lose keys; at most 1."""

    needs = Needs()

    def __init__(self, layer: LayerInfo, sinks: int, recent: int) -> None:
        self.settings: dict[str, Any] = {"sinks": sinks, "recent": recent}
        self._window, self._kv_heads = Window(size=recent, sinks=sinks), layer.num_kv_heads
        self._change, self._whole = torch.zeros(2, layer.num_kv_heads, dtype=torch.float64)
        self._served = False

    def observe(
        self, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, inputs: Inputs | None = None
    ) -> None:
        if softmax.window is not None:
            return
        self._served, lose = True, self._window.size + self._window.sinks
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
        keys = Keys(kv=KV(k, v), tq=q.shape[2], softmax=softmax)
        streaming, _ = self._window.run_prefill(q, keys, range(keys.tq), "auto")
        full, other = (_with_sinks(part, softmax) for part in (flash(q, keys.kv, softmax), streaming))
        for total, x in ((self._change, other - full), (self._whole, full)):
            squares = x[:, :, lose:].double().square().sum((0, 2, 3)).cpu()  # [H]
            total += squares.unflatten(0, (self._kv_heads, -1)).sum(1)

    def weights(self) -> dict[str, Tensor]:
        if not self._served:
            return {}
        return {"alpha": (self._change / self._whole.clamp(min=1e-30)).sqrt().clamp(max=1).float()}


class HeadAlphas(nn.Module):
    """``alpha`` [Hkv], by which a KV head's full attention is mixed with streaming attention."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(kv_heads))

    def forward(self, full: Partial, streaming: Partial, softmax: Softmax) -> Tensor:
        """alpha * full + (1 - alpha) * streaming, [B, H, T, D]."""
        a, b = (_with_sinks(part, softmax) for part in (full, streaming))
        alpha = self.alpha.repeat_interleave(a.shape[1] // len(self.alpha))[:, None, None].to(a.dtype)
        return alpha * a + (1 - alpha) * b


def _with_sinks(part: Partial, softmax: Softmax) -> Tensor:
    """The output, with the model's own sinks, if it has any."""
    return part.out if softmax.sinks is None else add_sinks(part, softmax.sinks).out
