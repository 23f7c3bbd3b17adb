"""Padding and positions in the recurrent layers of transformers' own hybrid models.

A recurrent layer (Mamba-2, gated DeltaNet, a short convolution) carries a state from token to token, so the
padding before a row must leave that state at zero. transformers hands such a layer the padding mask of the
call's tokens, and the layer zeroes their hidden states. Three cases are left, and a patch makes them right:

- a call of one token has no mask, so the state of a row that begins later takes up the padding;
- a projection with a bias returns the bias at padding, which the convolution then mixes into the first
  tokens of the row;
- where a continued call has no position ids, Bamba counts its positions from 0 again.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.errors import FarspanError
from ..session import Session
from .decoder_call import tokens_of
from .hooks import Hook, replace_forward
from .models import ModelInfo
from .releases import given_cache
from .transformers_private import masks_padding


class _Masks(threading.local):
    """Padding masks [B, T] of the tokens that run, 0 at padding; None where none of them is padding.

    call: while the decoder runs. layer: while a recurrent layer runs, which may be in the backward pass.
    """

    call: Tensor | None = None
    layer: Tensor | None = None


def mask_padding(
    info: ModelInfo, session: Session, continues: Callable[[], bool]
) -> list[Callable[[], None]]:
    """Make the recurrent layers of a model leave out padding in every call. Returns the undo steps; there are
    none for a model without recurrent layers.

    continues: whether recurrent layers continue their state in a call of several tokens; it is called at the
    first such call. If they do not, the call raises FarspanError.
    """
    recurrent, masks = [m for m in info.decoder.modules() if _is_recurrent(m)], _Masks()
    undo: list[Callable[[], None]] = []
    for module in recurrent:
        before, after = Hook(partial(_before_layer, session, masks)), Hook(partial(_after_layer, masks))
        undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.append(module.register_forward_hook(after, always_call=True).remove)
        for linear in module.modules():
            if isinstance(linear, nn.Linear) and linear.bias is not None:
                undo.append(linear.register_forward_hook(Hook(partial(_zero_padding, masks))).remove)
    if recurrent:
        undo.append(replace_forward(info.decoder, partial(_forward, info, session, masks, continues)))
    return undo


def token_mask(session: Session, mask: Tensor | None, tokens: int) -> Tensor | None:
    """The last ``tokens`` columns of a padding mask [B, Tk], which are those of the call's tokens; None where
    none of these is padding. In a call that is split over ranks, the columns of this rank's tokens."""
    if mask is None:
        return None
    if session.call is not None:
        real, split = session.token_mask(session.call, mask), session.call.split
        return real if real is None or split is None else real[:, split.take(session.ranks.rank, mask.device)]
    padding = session.padding(mask, *mask.shape)
    past = mask.shape[1] - tokens
    begun = padding.starts is None or max(padding.starts) <= past
    return None if begun and padding.ends is None else mask[:, past:]


def _is_recurrent(module: nn.Module) -> bool:
    forward = type(module).forward
    return masks_padding(forward) and "attention_mask" in inspect.signature(forward).parameters


def _forward(
    info: ModelInfo,
    session: Session,
    masks: _Masks,
    continues: Callable[[], bool],
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The forward of the decoder. It runs for each chunk of a prompt that is cut. Except where farspan is
    switched off, every argument is a keyword argument."""
    tokens = tokens_of(kwargs)
    if session.off or tokens is None:
        return original(*args, **kwargs)
    cache, length = given_cache(kwargs), tokens.shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    if past and length > 1 and not continues():
        raise FarspanError(
            f"This call continues a cache of {past} tokens by {length} tokens, and in this release of "
            f"transformers, layers of {type(info.model).__name__} without attention forget their state in "
            "such a call: pass all tokens in one call without a cache."
        )
    if (
        past
        and kwargs.get("position_ids") is None
        and "position_ids" in inspect.signature(type(info.decoder).forward).parameters
    ):
        kwargs["position_ids"] = torch.arange(past, past + length, device=tokens.device)[None]
    masks.call = token_mask(session, kwargs.get("attention_mask"), length)
    try:
        return original(*args, **kwargs)
    finally:
        masks.call = None


def _before_layer(
    session: Session, masks: _Masks, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The pre-hook of a recurrent layer, to which decoder layers pass the mask by its name. Where gradient
    checkpointing repeats the layer, the mask is transformers' own."""
    if session.off:
        return None
    masks.layer = kwargs.get("attention_mask") if masks.call is None else masks.call
    return args, {**kwargs, "attention_mask": masks.layer}


def _after_layer(masks: _Masks, *_: Any) -> None:
    masks.layer = None


def _zero_padding(masks: _Masks, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    """The hook of a projection: its output [B, T, channels] with zeros at padding."""
    mask = masks.layer
    return None if mask is None or out.shape[:2] != mask.shape else out * mask.to(out.dtype)[..., None]
