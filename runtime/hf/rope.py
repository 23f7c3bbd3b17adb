"""RoPE whose frequencies depend on the length of a call (dynamic NTK, longrope), for calls that run in
parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..session import Session
from .hooks import replace_forward


def follow_length(decoder: nn.Module, session: Session) -> list[Callable[[], None]]:
    """Make the rotary embeddings use the length of the whole call, by ``session.positions`` where it is set.

    A rotary embedding takes the length from the largest position that it is called with. So a chunk of a
    prompt, or the part of one rank, would be rotated by other frequencies than the whole prompt. Returns the
    undo steps.
    """
    return [replace_forward(m, partial(_forward, session)) for m in decoder.modules() if _scaled(m)]


def _scaled(module: nn.Module) -> bool:
    """Whether this is a rotary embedding that has another type than "default" for some kind of layer.

    Which types depend on the length differs between models: in PhiMoE every scaled type does.
    """
    types = getattr(module, "rope_type", None)
    return any(x not in (None, "default") for x in (types.values() if isinstance(types, dict) else [types]))


def _forward(
    session: Session, original: Callable[..., Any], x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The embeddings of ``position_ids`` [..., T], computed together with the last position of the whole
    call."""
    whole = session.positions
    if whole is None:
        return original(x, position_ids, *args, **kwargs)
    if whole.dim() == position_ids.dim() == 3:  # M-RoPE: text positions may come before those of the axes
        whole = whole[-position_ids.shape[0] :]
    last = whole.amax().to(position_ids).expand(*position_ids.shape[:-1], 1)
    out = original(x, torch.cat([position_ids, last], -1), *args, **kwargs)  # [..., T + 1, D] each
    return out[..., :-1, :] if isinstance(out, Tensor) else tuple(part[..., :-1, :] for part in out)
