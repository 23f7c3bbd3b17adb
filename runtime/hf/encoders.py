"""Encoder mixers in place of the self-attention of BERT-like encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.errors import FarspanError, SpecError, Unsupported
from ...attention.hybrid.encoder import EncoderMixer
from ..layer_numbers import by_layer
from .models import place_beside


class _InPlace(nn.Module):
    """An encoder mixer under the signature of BERT's self-attention."""

    def __init__(self, mixer: EncoderMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        return self.mixer(hidden_states, _real(attention_mask, hidden_states)), None


def put_encoder_mixers(model: nn.Module, modules: Mapping[int, EncoderMixer]) -> Callable[[], None]:
    """Put encoder mixers in place of the self-attention of an encoder such as BERT, RoBERTa or ELECTRA.

    modules: by layer number; a negative number counts from the last layer. The layer keeps its dropout, its
    residual and its norm; the output projection of the attention becomes the identity, because mixers have
    their own. The modules are moved to the device of the attention. Returns the function that puts
    everything back.

    Raises Unsupported for a causal LM and for a model without such layers, and SpecError for a layer that
    does not exist, a module that is no encoder mixer, has another hidden size or is given twice.
    """
    name = type(model).__name__
    blocks: list[Any] = [x for x in model.modules() if _is_self_attention(x)]
    causal = any(getattr(x.self, "is_decoder", False) for x in blocks)
    if causal or not blocks:
        why = (
            "it is causal, and encoder mixers read later tokens"
            if causal or hasattr(model, "generate")
            else ""
        )
        raise Unsupported(
            f"farspan cannot put encoder mixers into {name}",
            [why or "it has no layers with the self-attention of BERT"],
        )
    chosen = by_layer("modules", modules, len(blocks))
    for index, (_, mixer) in chosen.items():
        size = blocks[index].output.dense.out_features
        if not isinstance(mixer, EncoderMixer) or mixer.hidden_size != size:
            raise SpecError(
                f"put_encoder_mixers takes encoder mixers with hidden_size {size} for {name}; got a "
                f"{type(mixer).__name__} with {getattr(mixer, 'hidden_size', 'none')} for layer {index}."
            )
    if len({id(mixer) for _, mixer in chosen.values()}) < len(chosen):
        raise SpecError("put_encoder_mixers got one module for two layers: give each layer its own module.")
    before = {index: (blocks[index].self, blocks[index].output.dense) for index in chosen}
    for index, (_, mixer) in chosen.items():
        place_beside(mixer, blocks[index].self)
        blocks[index].self, blocks[index].output.dense = _InPlace(mixer), nn.Identity()

    def undo() -> None:
        for index, (attention, dense) in before.items():
            blocks[index].self, blocks[index].output.dense = attention, dense

    return undo


def _is_self_attention(module: Any) -> bool:
    """Whether ``module`` is an attention block as BERT's, and not one that reads another sequence."""
    attention, output = getattr(module, "self", None), getattr(module, "output", None)
    return (
        isinstance(attention, nn.Module)
        and isinstance(getattr(output, "dense", None), nn.Linear)
        and not getattr(module, "is_cross_attention", False)
    )


def _real(mask: Any, hidden: Tensor) -> Tensor | None:
    """[B, T] bool, True for tokens that are not padding, of the mask that BERT's attention is called with:
    [B, T], or [B, 1, T, T] with True or 0 for the pairs to read. None where there is none.

    Raises FarspanError for a mask of another form, and for one that is not the same for all queries.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise FarspanError(
            f"Encoder mixers take padding masks [B, T]; this call has a mask of {type(mask).__name__}: set "
            "the model's attention to eager or sdpa."
        )
    if mask.dim() == 2:
        return mask.bool()
    pairs = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    real = pairs[:, 0]
    if bool((pairs != real[:, None]).any()):
        raise FarspanError(
            "Encoder mixers read the whole row, but the attention mask of this call hides other keys from "
            "one query than from another: pass a padding mask [B, T]."
        )
    return real.expand(len(hidden), -1)
