"""Watching the queries and keys of a patched model, for calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...attention.errors import Unsupported
from ...attention.softmax import Softmax
from ..layer import Layer
from .interface import ATTRIBUTE


def replace_attention(module: nn.Module, attend: Callable[..., Tensor]) -> Callable[[], None]:
    """Let ``attend(q, k, v, mask, softmax)`` -> [B, Tq, H, D] stand for the layer of a patched attention
    module. Returns the undo step."""
    layer = getattr(module, ATTRIBUTE)
    setattr(module, ATTRIBUTE, attend)
    return lambda: setattr(module, ATTRIBUTE, layer)


def observe(module: nn.Module, before_rope: bool, observer: Callable[..., None]) -> Callable[[], None]:
    """Call ``observer(q, k, v, softmax)`` with what a patched attention module is
    given, uncached; with RoPE undone where asked.

    Rotation is undone by the module's own ``apply_rotary_pos_emb`` with the opposite angle, since hooks on
    projections miss fused ones and norms behind them; YaRN scales cos and sin, hence the division. Returns
    the undo step.
    """
    layer: Layer = getattr(module, ATTRIBUTE)
    given = inspect.signature(type(module).forward)
    rotate = getattr(inspect.getmodule(type(module)), "apply_rotary_pos_emb", None)
    angles: list[tuple[Tensor, Tensor] | None] = []
    if before_rope and rotate is None and "position_embeddings" in given.parameters:
        raise Unsupported(
            f"farspan cannot rank channels before RoPE in {type(module).__name__}",
            ["its module has no apply_rotary_pos_emb to undo; rank by 'qk', which is taken after RoPE"],
        )

    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        angles[:] = [given.bind(module, *args, **kwargs).arguments.get("position_embeddings")]

    def observed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax: Softmax) -> Tensor:
        if before_rope and rotate is not None and angles[0] is not None:
            cos, sin = (x.float() for x in angles[0])
            size = cos**2 + sin**2
            observer(*rotate(q.float(), k.float(), cos / size, -sin / size), v, softmax)
        else:
            observer(q, k, v, softmax)
        return layer(q, k, v, mask, softmax)

    hook = module.register_forward_pre_hook(remember, with_kwargs=True)
    setattr(module, ATTRIBUTE, observed)

    def undo() -> None:
        hook.remove()
        setattr(module, ATTRIBUTE, layer)

    return undo
