"""What transformers calls: one attention function and one mask function, registered under one name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from ...attention.errors import FarspanError
from ...attention.softmax import Softmax
from ..layer import Layer
from ..layer_over_ranks import carrier
from ..shard import running
from .transformers_private import finds_packed_sequences, is_causal_mask, is_sliding_window_mask

NAME = "farspan"  # free of "flash", "sdpa" and "flex_attention", which trigger special paths in transformers
ATTRIBUTE = "_farspan"  # on an attention module: its Layer


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, Tq, D], key and value [B, Hkv, Tk, D] after RoPE and
    cache."""
    layer: Layer | None = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise FarspanError(
            f"{type(module).__name__} is set to farspan's attention but not patched: use farspan.patch."
        )
    if dropout:
        raise FarspanError(
            f"farspan has no attention dropout; set the model's attention_dropout to 0 (it is {dropout})."
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise beyond_causal()
    if kwargs.get("position_bias") is not None:
        raise FarspanError(f"farspan cannot add the position bias that {type(module).__name__} asks for.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softmax = Softmax(scale, softcap, sliding_window, s_aux)
    if not torch.is_autocast_enabled(query.device.type):
        return layer(query, key, value, attention_mask, softmax), None
    query, key, value = autocast(query, key, value)
    with torch.autocast(query.device.type, enabled=False):  # scores are in float32
        return layer(query, key, value, attention_mask, softmax), None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that torch's own attention takes them in: under autocast the lower one, else as they are.

    RoPE gives queries and keys in float32 there, projections give values in the lower precision.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: the 2-D padding mask of the keys at hand, never an N x N tensor; over
    ranks, the carrier of the running call.

    Causality and windows are the operations' own, so only those two mask functions can be served.
    """
    if not is_causal_mask(mask_function) and not is_sliding_window_mask(mask_function):
        raise beyond_causal()
    if attention_mask is None:
        return None
    call = running.get()
    if call is not None:
        return carrier(call, attention_mask.device)
    return attention_mask[:, kv_offset : kv_offset + kv_length]


def check_positions(positions: Tensor | None) -> None:
    """Refuse the positions of a call without a mask and without a cache in which transformers finds packed
    sequences: those [B, T] that do not count up by one. It would look among one rank's alone."""
    if positions is not None and positions.dim() == 3:  # of Qwen2-VL and its kin: those of text come first
        positions = positions[0] if positions.shape[0] == 4 else None
    if positions is not None and finds_packed_sequences(positions):
        raise beyond_causal()


def beyond_causal() -> FarspanError:
    """The error of a call that wants another mask than farspan serves, on one device and over ranks."""
    return FarspanError(
        "This call wants a mask beyond causal attention, a sliding window and padding (packed sequences, "
        "is_causal=False, a bidirectional prefix or image tokens), which farspan does not serve."
    )


def register() -> None:
    if NAME not in AttentionInterface():
        AttentionInterface.register(NAME, _attention_forward)
        AttentionMaskInterface.register(NAME, _padding_mask)
