"""Mixers that stand for good in place of attention: the layers of a converted model, which works without a
patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.hybrid.mixer import Mixer
from ...parallel.mechanisms.state_passing import pass_state
from ..layer_over_ranks import carried
from ..padding import checked_2d
from ..session import Session
from .decoder_call import arguments, settle_cache
from .hooks import replace_forward
from .mixers import adopt_states, call_of, replace_module, run_mixer, state_layer
from .models import FULL, ModelInfo
from .projections import has_rope
from .releases import given_cache

_LIST = "_farspan_in_place"  # the attribute of a decoder with its InPlace objects


class InPlace:
    """The forward of a mixer in a converted model, called as the layer's attention would be. It can be copied
    and pickled with the mixer.

    attention: the attention that is replaced; its class is kept. mask: of the running call, [B, T] and the
    number of tokens before it; None where no token is padding.
    """

    def __init__(self, mixer: Mixer, index: int, attention: nn.Module) -> None:
        self.mixer, self.index, self.attention = mixer, index, type(attention)
        self.has_rope = has_rope(attention)
        self.mask: tuple[int, Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        call = self.call(args, kwargs)
        mixer, layer = self.mixer, state_layer(given_cache(call), self.index)
        hidden: Tensor = call["hidden_states"]
        x, rotary = hidden.to(dtype_of(mixer)), call.get("position_embeddings")
        mask, tokens = None, hidden.shape[1]
        if self.mask is not None:
            begin = (0 if layer is None else layer.tokens_seen) - self.mask[0]
            mask = self.mask[1][:, begin : begin + tokens]
        forward = partial(type(mixer).forward, mixer)
        out, _ = run_mixer(mixer, forward, layer, x, tokens, mask, rotary)
        return out.to(hidden.dtype), None

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names in the forward of the attention."""
        return call_of(self.attention.forward, self.has_rope, args, kwargs)


def pass_states_in_place(decoder: nn.Module, session: Session) -> list[Callable[[], None]]:
    """Make the mixers of a converted model pass their states along ranks. Returns the undo steps."""
    return [
        replace_forward(one.mixer, partial(_over_ranks, one, session)) for one in getattr(decoder, _LIST, ())
    ]


def _over_ranks(
    place: InPlace, session: Session, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The forward of a mixer in a call that may be split over ranks."""
    arguments = place.call(args, kwargs)
    call = carried(arguments.get("attention_mask")) or session.call
    if call is None or call.split is None:
        return original(*args, **kwargs)
    mixer, layer = place.mixer, state_layer(given_cache(arguments), place.index)
    hidden: Tensor = arguments["hidden_states"]
    x, rotary = hidden.to(dtype_of(mixer)), arguments.get("position_embeddings")
    mask, tokens = session.token_mask(call, hidden), call.total - call.past
    forward = partial(pass_state, mixer, split=call.split, ranks=session.ranks)
    out, _ = run_mixer(mixer, forward, layer, x, tokens, mask, rotary)
    return out.to(hidden.dtype), None


def dtype_of(mixer: nn.Module) -> torch.dtype:
    """The dtype of the parameters of a mixer."""
    return next(mixer.parameters()).dtype


def stand_in(info: ModelInfo, mixers: Mapping[int, Mixer]) -> list[Callable[[], None]]:
    """Put each mixer in place of the attention of its layer, for calls without a cache and without padding.
    Returns the undo steps."""
    undo: list[Callable[[], None]] = []
    for index, mixer in mixers.items():
        attention = info.attention[index]
        undo += replace_module(info.decoder, attention, mixer)
        place: Any = InPlace(mixer, index, attention)
        mixer.forward = place  # type: ignore[method-assign]
        undo.append(partial(delattr, mixer, "forward"))
    return undo


def settle(info: ModelInfo, mixers: Mapping[int, Mixer]) -> None:
    """Put each mixer in place of the attention of its layer for good. Calls with a cache keep its state, and
    padding is left out of it."""
    stand_in(info, mixers)
    setattr(info.decoder, _LIST, [mixer.forward for mixer in mixers.values()])
    info.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)


def mixers_of(decoder: nn.Module) -> dict[int, Mixer]:
    """The mixers of a converted model's decoder, by layer."""
    return {one.index: one.mixer for one in getattr(decoder, _LIST, ())}


def before_decoder(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """The pre-hook of a converted model's decoder: it gives the cache places for states, and the mixers the
    call's padding mask."""
    call = arguments(decoder, args, kwargs)
    cache, places = settle_cache(decoder, call), getattr(decoder, _LIST)
    if cache is not None:
        adopt_states(cache, mixers_of(decoder), decoder.config.num_hidden_layers)
    past = 0 if cache is None else cache.get_seq_length()
    mask = _padding_mask(call.get("attention_mask"), past)
    for place in places:
        place.mask = None if mask is None else (past, mask)
    return (), call


def _padding_mask(mask: Any, past: int) -> Tensor | None:
    """[B, T] bool for the tokens behind the first ``past``; None where none of them is padding."""
    if isinstance(mask, dict):
        mask = mask.get(FULL)
    if mask is None:
        return None
    mask = checked_2d(mask, "A converted model", ": leave the mask to the model, and the cache too")
    own = mask[:, past:].bool()
    return None if bool(own.all()) else own
