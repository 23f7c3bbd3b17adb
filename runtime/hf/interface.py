"""The attention function and the mask function that transformers calls, registered under one name."""

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
from ..store.shard import running
from .transformers_private import finds_packed_sequences, is_causal_mask, is_sliding_window_mask

NAME = "farspan"  # without "flash", "sdpa" or "flex_attention", for which transformers has special code
ATTRIBUTE = "_farspan"  # the attribute of an attention module that holds its Layer


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
    """The attention function for transformers. query [B, H, Tq, D], key and value [B, Hkv, Tk, D], after RoPE
    and the update of the cache."""
    layer: Layer | None = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise FarspanError(
            f"{type(module).__name__} is set to farspan's attention, but not patched: use farspan.patch."
        )
    if dropout:
        raise FarspanError(
            f"attention_dropout is {dropout}, and farspan has no attention dropout: set it to 0 in the "
            "model's config."
        )
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise beyond_causal()
    if kwargs.get("position_bias") is not None:
        raise FarspanError(
            f"{type(module).__name__} passes a position bias, which farspan does not serve: use a model "
            "without one."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softmax = Softmax(scale, softcap, sliding_window, s_aux)
    if not torch.is_autocast_enabled(query.device.type):
        return layer(query, key, value, attention_mask, softmax), None
    query, key, value = autocast(query, key, value)
    with torch.autocast(query.device.type, enabled=False):  # scores are in float32
        return layer(query, key, value, attention_mask, softmax), None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype that torch's own attention uses: the autocast dtype under autocast, unchanged
    otherwise.

    Under autocast, RoPE returns queries and keys in float32, and projections return values in the autocast
    dtype.
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
    """The mask function for transformers. It returns the 2-D padding mask of the keys and never makes an
    N x N tensor. Over ranks it returns the carrier of the present call.

    Farspan's operations apply causality and sliding windows themselves, so only these two mask functions are
    allowed.
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
    """Raise FarspanError for positions [B, T] of packed sequences, which do not count up by one. It is called
    for a call without a mask and without a cache. Over ranks, transformers itself would check only the
    positions of one rank."""
    # in Qwen2-VL and its relatives, text positions come first
    if positions is not None and positions.dim() == 3:
        positions = positions[0] if positions.shape[0] == 4 else None
    if positions is not None and finds_packed_sequences(positions):
        raise beyond_causal()


def beyond_causal() -> FarspanError:
    """The error for a call whose mask farspan does not serve, on one device and over ranks."""
    return FarspanError(
        "This call needs a mask for packed sequences, is_causal=False, a bidirectional prefix or image "
        "tokens, which farspan does not serve. It serves causal attention, a sliding window and padding: "
        "change the call, or remove the patch."
    )


def register() -> None:
    if NAME not in AttentionInterface():
        AttentionInterface.register(NAME, _attention_forward)
        AttentionMaskInterface.register(NAME, _padding_mask)
