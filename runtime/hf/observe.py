"""Observe the queries and keys of a patched model, for calibration."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ...attention.kv import KV
from ...attention.needs import Needs
from ...attention.ops.flash import flash
from ...attention.partial import add_sinks
from ...attention.softmax import Softmax
from ..layer import Layer
from .inputs import feed_inputs
from .interface import ATTRIBUTE
from .models import ModelInfo


def over_ranks(info: ModelInfo) -> bool:
    """Whether the model is patched over ranks."""
    layers = [getattr(module, ATTRIBUTE, None) for module in info.attention.values()]
    return any(isinstance(layer, Layer) and layer.session.mesh is not None for layer in layers)


def replace_attention(module: nn.Module, attend: Callable[..., Tensor]) -> Callable[[], None]:
    """Replace the layer of a patched attention module by ``attend(q, k, v, mask, softmax)`` -> [B, Tq, H, D].
    Returns the undo step."""
    layer = getattr(module, ATTRIBUTE)
    setattr(module, ATTRIBUTE, attend)
    return lambda: setattr(module, ATTRIBUTE, layer)


def attend_densely(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
    """The layer's own dense attention [B, H, T, D] of a call without cache and padding, in the dtype of q."""
    part = flash(q, KV(k, v), softmax, window=softmax.window)
    if softmax.sinks is not None:
        part = add_sinks(part, softmax.sinks)
    return part.out.to(q.dtype)


def observe(info: ModelInfo, index: int, needs: Needs, observer: Callable[..., None]) -> Callable[[], None]:
    """Call ``observer(q, k, v, softmax)`` in every call of a patched layer without a cache, with the tensors
    of the call. Where ``needs`` names inputs, the observer is also called with ``inputs=``: queries and keys
    before RoPE in float32, hidden states in their dtype. Returns the undo step."""
    module = info.attention[index]
    layer: Layer = getattr(module, ATTRIBUTE)
    session = layer.session
    undo = feed_inputs(info, {index: needs}, session) if needs.inputs else []

    def observed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax: Softmax) -> Tensor:
        if needs.inputs:
            assert session.given is not None, "the hook on the attention module has run"
            own = session.given.feed(q.float(), KV(k.float(), v), None)
            observer(q, k, v, softmax, inputs=own)
        else:
            observer(q, k, v, softmax)
        return layer(q, k, v, mask, softmax)

    setattr(module, ATTRIBUTE, observed)

    def stop() -> None:
        for step in reversed(undo):
            step()
        setattr(module, ATTRIBUTE, layer)

    return stop
