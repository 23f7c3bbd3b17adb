"""Everything that farspan uses of transformers beyond its documented API. No other module uses it directly.

These are names with a leading underscore, undocumented attributes and functions, and facts that are read from
the source or the closure of a function. tests/test_private_apis.py checks each of them in the installed
release.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import causal_mask_function, find_packed_sequence_indices

# --- the attention that a config names -------------------------------------------------------------------

ATTENTION = "_attn_implementation_internal"
"""The attribute of a config that holds the name of its attention implementation.

The public ``set_attn_implementation`` is a method of models and changes every part of a model. A patch sets,
compares and restores the name in one config."""


def attention_of(config: Any) -> str | None:
    """The name of the attention implementation in a config; None for transformers' default, and for an object
    that is not a config. The public API can only set the name."""
    return getattr(config, ATTENTION, None)


def set_attention(config: Any, name: str | None) -> None:
    """Set the attention implementation of this config only, not of the configs inside it."""
    setattr(config, ATTENTION, name)


def reset_attention(config: Any) -> None:
    """Let transformers choose the attention implementation of this config and of those inside it. The public
    ``set_attn_implementation`` needs a model."""
    config._attn_implementation = None


def calls_attention_interface(forward: Callable[..., Any]) -> bool | None:
    """Whether a module's ``forward`` calls attention by the name in its config, read from its source; None
    where the source is not available. transformers has no public function for this: ``AttentionInterface`` is
    a table of functions, and a module looks its function up while it runs."""
    source = source_of(forward)
    return None if source is None else "attention_interface" in source


def masks_padding(forward: Callable[..., Any]) -> bool:
    """Whether a module's ``forward`` zeroes hidden states at padding, read from its source. The layers of
    transformers with a recurrent state or a convolution do, and no others; they have no common base class."""
    return "apply_mask_to_padding_states" in (source_of(forward) or "")


def global_of(function: Callable[..., Any], name: str) -> Any:
    """What a global name is in the file of a function; None where it is not defined. Recurrent layers call
    their scans by such names, whichever kernel is installed."""
    return inspect.unwrap(function).__globals__.get(name)


def with_globals(function: Callable[..., Any], names: dict[str, Any]) -> Callable[..., Any]:
    """A copy of a function, without its decorators, in which ``names`` stand for the globals of its file."""
    own = inspect.unwrap(function)
    copy = types.FunctionType(
        own.__code__, {**own.__globals__, **names}, own.__name__, own.__defaults__, own.__closure__
    )
    copy.__kwdefaults__ = own.__kwdefaults__
    return copy


@functools.cache
def source_of(forward: Callable[..., Any]) -> str | None:
    """The source text of a function; None where it is not available."""
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):
        return None


# --- masks -----------------------------------------------------------------------------------------------


def is_causal_mask(mask_function: Callable[..., Any]) -> bool:
    """Whether this is transformers' causal mask function. The public API passes it to mask functions and has
    no name for it."""
    return mask_function is causal_mask_function


def is_sliding_window_mask(mask_function: Callable[..., Any]) -> bool:
    """Whether this is the mask function of a causal sliding window, which is the conjunction of exactly two
    mask functions. transformers makes it as a closure without a public name."""
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    pair = next((p for p in parts if isinstance(p, tuple)), ())
    names = {getattr(p, "__qualname__", "").split(".")[0] for p in pair}
    return (
        len(pair) == 2
        and causal_mask_function in pair
        and names == {"causal_mask_function", "sliding_window_overlay"}
    )


def finds_packed_sequences(positions: Tensor) -> bool:
    """Whether transformers finds several packed sequences in one row of positions [B, T]. It does this inside
    its mask functions; there is no public function for it."""
    return find_packed_sequence_indices(positions) is not None


# --- caches ----------------------------------------------------------------------------------------------


def layer_types(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of each decoder layer, such as "full_attention", and the arguments of its cache layer.

    config: the config of the decoder. The public ``layer_types`` of a config exists only where layers differ,
    and has other names.
    """
    return get_layer_types_and_kwargs(config)


def replicated_layer(cache: Any) -> Any:
    """The class (or function) by which a cache makes missing layers; None where no layer is missing. In the
    public API it is set once, when the cache is made."""
    return getattr(cache, "layer_class_to_replicate", None)


def is_offloading(cache: Any) -> bool:
    """Whether a cache moves its layers to another memory while they are not used. In the public API this is
    an argument of the constructor only."""
    return bool(getattr(cache, "offloading", False))


def caches_nothing(layer: Any) -> bool:
    """Whether this is the cache layer of a layer without a cache. Its class does not exist in every supported
    release, so its name is compared."""
    return type(layer).__name__ == "DummyLayer"


# --- generation ------------------------------------------------------------------------------------------


def default_generation_settings() -> dict[str, Any]:
    """The defaults that ``generate`` uses for settings that are not set. The public ``GenerationConfig()``
    has None for them."""
    return GenerationConfig._get_default_generation_params()
