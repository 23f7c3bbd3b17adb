"""Mixers in place of attention modules: the cache layer of their state, and how a decoder layer calls
them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from ...attention.errors import FarspanError, Unsupported
from ...attention.hybrid.mixer import Mixer, Rotary, State
from ...attention.hybrid.projections import Projected
from ...parallel.mechanisms.state_passing import pass_state
from ..layer import Session
from ..layer_over_ranks import carried
from ..mixers import Mixed
from ..store.lasting import runs_lasting
from .hooks import replace_forward
from .models import ModelInfo, place_beside
from .projections import has_rope, rope_reasons
from .recurrent import token_mask
from .releases import given_cache

_signature = functools.cache(inspect.signature)


class StateLayer(LinearAttentionLayer, CacheLayerMixin):
    """transformers' cache layer for linear attention, with the state of a mixer in it.

    transformers' layer does not count tokens, marks a state as present only with a convolution, and neither
    repeats nor selects rows. This class adds these. Masks and positions are made from the number of tokens.
    A new state replaces the old one and is not written into it, because a state may carry gradients. Where
    every part of the state grows with the tokens, it can be cropped.
    """

    recurrent_states: dict[int, Tensor | None]
    is_compileable = False

    def __init__(self, mixer: Mixer) -> None:
        CacheLayerMixin.__init__(self)
        self.layout = mixer.layout
        LinearAttentionLayer.__init__(self, number_of_states=len(self.layout))
        self.only_grows = bool(mixer.growing) and not mixer.state_shapes
        self.tokens_seen, self.padded_right = 0, False

    def keep_state(self, state: State, tokens: int, mask: Tensor | None) -> None:
        """Store the state that a call of ``tokens`` tokens with ``mask`` has returned."""
        self.tokens_seen += tokens
        self.padded_right = mask is not None and not bool(mask[:, -1].all())
        for i, x in enumerate(state):
            self.recurrent_states[i] = x
            self.is_recurrent_states_initialized[i] = self.has_previous_state[i] = True
        self.device, self.dtype = state[0].device, state[0].dtype

    def initial_state(self) -> State | None:
        """The state with which the next call begins; None before the first call."""
        return tuple(x for x in self.recurrent_states.values() if x is not None) if self.tokens_seen else None

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens_seen + query_length, 0

    def reset(self) -> None:
        self.tokens_seen = 0
        for i in range(self.number_of_states):
            self.recurrent_states[i] = None
            self.is_recurrent_states_initialized[i] = self.has_previous_state[i] = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.recurrent_states = {
            i: None if x is None else change(x) for i, x in self.recurrent_states.items()
        }

    @property
    def is_croppable(self) -> bool:
        return self.only_grows

    def crop(self, tokens_to_remove: int) -> None:
        count = abs(tokens_to_remove)
        if count and not self.only_grows:
            raise FarspanError(
                "The state of a mixer cannot be cropped, because it is one sum over all tokens: start a new "
                "cache, use a deep copy that was made earlier, or generate without assisted decoding."
            )
        if count and self.padded_right:
            raise FarspanError(
                "The state of a mixer cannot be cropped after a call with padding on the right: pad on the "
                "left (tokenizer.padding_side = 'left')."
            )
        if count and self.tokens_seen:
            *_, tokens = self.recurrent_states.values()
            assert tokens is not None
            self.recurrent_states[len(self.layout) - 1] = (tokens - count).clamp(min=0)
            self.tokens_seen = max(0, self.tokens_seen - count)

    def update(self, *_: Any, **__: Any) -> NoReturn:
        raise FarspanError(
            "This cache holds the state of a mixer for a layer that now has its attention again: start a new "
            "cache."
        )


def check_rope(info: ModelInfo, mixed: Mapping[int, Mixed]) -> None:
    """Raise Unsupported where a mixer cannot apply RoPE as the model does."""
    for index, entry in mixed.items():
        mixer = entry.mixer
        if (
            isinstance(mixer, Projected)
            and mixer.rotates
            and (reasons := rope_reasons(info.attention[index]))
        ):
            what = f"farspan cannot put the mixer {mixer.name} into layer {index}"
            raise Unsupported(f"{what} of {type(info.model).__name__}", reasons)


def put_mixers(info: ModelInfo, mixed: Mapping[int, Mixed], session: Session) -> list[Callable[[], None]]:
    """Put each mixer in place of the attention module of its layer. Returns the undo steps."""
    undo: list[Callable[[], None]] = []
    for index, entry in mixed.items():
        attention = info.attention[index]
        place_beside(entry.mixer, attention)
        undo += replace_module(info.decoder, attention, entry.mixer)
        call = partial(call_of, type(attention).forward, has_rope(attention))
        undo.append(replace_forward(entry.mixer, partial(_forward, call, index, entry, session)))
    return undo


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> list[Callable[[], None]]:
    """Put ``new`` wherever a module below ``root`` has the child ``old``. Returns the undo steps."""
    undo: list[Callable[[], None]] = []
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
                undo.append(partial(setattr, parent, name, old))
    return undo


@runs_lasting
def _forward(
    read: Callable[..., dict[str, Any]],
    index: int,
    mixed: Mixed,
    session: Session,
    original: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The forward of a mixer that stands in place of attention. read: returns the arguments by the parameter
    names of that attention, see ``call_of``."""
    if session.off:
        raise FarspanError(
            f"The model was set to another attention while the mixer {mixed.mixer.name} replaces that of "
            f"layer {index}: call remove(), or set the attention back to farspan."
        )
    call = read(args, kwargs)
    hidden, mixer = call["hidden_states"], mixed.mixer
    layer = state_layer(given_cache(call), index)
    mask, rotary = call.get("attention_mask"), call.get("position_embeddings")
    over = carried(mask) or session.call
    if over is None:
        tokens, mask = hidden.shape[1], token_mask(session, mask, hidden.shape[1])
        mask = None if mask is None else mask.bool()
    else:
        tokens, mask = over.total - over.past, session.token_mask(over, hidden)
    forward = original
    if over is not None and over.split is not None:
        forward = partial(pass_state, mixer, split=over.split, ranks=session.ranks)
    out, state = run_mixer(mixer, forward, layer, hidden, tokens, mask, rotary)
    mixed.count(hidden, state)
    return out.to(hidden.dtype), None


def run_mixer(
    mixer: Mixer,
    forward: Callable[..., tuple[Tensor, State]],
    layer: StateLayer | None,
    hidden: Tensor,
    tokens: int,
    mask: Tensor | None,
    rotary: Rotary | None,
) -> tuple[Tensor, State]:
    """Run a mixer in a call of ``tokens`` tokens: by ``step`` for one token with tokens before it, else by
    ``forward(hidden, state, mask, rotary)``. Returns the output, and the state after the call, which
    ``layer`` keeps. hidden, rotary: over ranks, of this rank's tokens. mask: of all tokens."""
    state = None if layer is None else layer.initial_state()
    if tokens == 1 and state is not None and mask is None:
        out, state = mixer.step(hidden[:, 0], state, rotary)
        out = out[:, None]
    else:
        out, state = forward(hidden, state, mask, rotary)
    if layer is not None:
        layer.keep_state(state, tokens, mask)
    return out, state


def call_of(
    signature: Callable[..., Any], rope: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of attention by the names in its forward, ``signature``. rope: whether this
    layer has RoPE; without it the position embeddings are left out."""
    call = dict(_signature(signature).bind(None, *args, **kwargs).arguments)
    call |= call.pop("kwargs", {})
    return call if rope else {**call, "position_embeddings": None}


def state_layer(cache: Cache | None, index: int) -> StateLayer | None:
    """The cache layer of the mixer in layer ``index``; None without a cache."""
    layer = None if cache is None else cache.layers[index]
    assert layer is None or isinstance(layer, StateLayer), "adopt_states runs before the layers"
    return layer


def adopt_states(cache: Cache, mixers: Mapping[int, Mixer], count: int) -> None:
    """Replace the layers of a cache that belong to mixers by StateLayers. count: number of layers of the
    model."""
    while mixers and len(cache.layers) < count:  # an empty cache makes each layer when it is first used
        cache.layers.append(cache.layer_class_to_replicate())
    for index, mixer in mixers.items():
        layer = cache.layers[index]
        if isinstance(layer, StateLayer) and layer.layout == mixer.layout:
            continue
        filled = any(getattr(layer, "has_previous_state", {}).values())  # transformers' own linear attention
        if filled or (isinstance(layer, CacheLayerMixin) and layer.get_seq_length()):
            raise FarspanError(
                f"This cache holds keys or another state for layer {index}, which now has the mixer "
                f"{mixer.name}: start a new cache."
            )
        cache.layers[index] = StateLayer(mixer)
