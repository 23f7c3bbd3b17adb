"""What farspan uses of transformers beyond its documented API. No other module names it.

Names with a leading underscore, undocumented attributes and functions, and what is read from the source or
the closure of a function. tests/test_private_apis.py checks each of them in the installed release.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import causal_mask_function, find_packed_sequence_indices

# --- the attention that a config names -------------------------------------------------------------------

ATTENTION = "_attn_implementation_internal"
"""The attribute of a config that holds the name of its attention implementation.

The public ``set_attn_implementation`` belongs to models and changes every part of one. A patch sets the copy
of one config, compares and restores it."""


def attention_of(config: Any) -> str | None:
    """The name of the attention implementation that a config asks for; None for transformers' default, and
    for what is no config. The public API only sets it."""
    return getattr(config, ATTENTION, None)


def set_attention(config: Any, name: str | None) -> None:
    """Name the attention implementation of this config alone; the configs inside it keep theirs."""
    setattr(config, ATTENTION, name)


def reset_attention(config: Any) -> None:
    """Let transformers choose the attention implementation of this config and of those inside it. The public
    ``set_attn_implementation`` needs a model."""
    config._attn_implementation = None


def calls_attention_interface(forward: Callable[..., Any]) -> bool | None:
    """Whether the source of a module's ``forward`` calls attention by the name in its config; None where
    there is no source at hand. transformers has no public way to ask: ``AttentionInterface`` is a table of
    functions, and a module looks its function up while it runs."""
    source = _source(forward)
    return None if source is None else "attention_interface" in source


@functools.cache
def _source(forward: Callable[..., Any]) -> str | None:
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):
        return None


# --- masks -----------------------------------------------------------------------------------------------


def is_causal_mask(mask_function: Callable[..., Any]) -> bool:
    """Whether this is transformers' causal mask function. The public API passes it to mask functions and
    offers no name for it."""
    return mask_function is causal_mask_function


def is_sliding_window_mask(mask_function: Callable[..., Any]) -> bool:
    """Whether this is the causal mask function of a sliding window: the conjunction of a window and
    causality, and of nothing else. transformers makes it as a closure, which carries no public mark."""
    parts = [cell.cell_contents for cell in getattr(mask_function, "__closure__", None) or ()]
    pair = next((p for p in parts if isinstance(p, tuple)), ())
    names = {getattr(p, "__qualname__", "").split(".")[0] for p in pair}
    return (
        len(pair) == 2
        and causal_mask_function in pair
        and names == {"causal_mask_function", "sliding_window_overlay"}
    )


def finds_packed_sequences(positions: Tensor) -> bool:
    """Whether transformers takes positions [B, T] for several sequences packed into one row. It decides so
    inside its mask functions, without a public way to ask."""
    return find_packed_sequence_indices(positions) is not None


# --- caches ----------------------------------------------------------------------------------------------


def layer_types(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of each decoder layer, such as "full_attention", and the arguments of its cache layer.

    config: of the decoder. Configs list ``layer_types`` only where layers differ, and with other names.
    """
    return get_layer_types_and_kwargs(config)


def replicated_layer(cache: Any) -> Any:
    """The class (or function) by which a cache makes the layers that it lacks; None where it has all. The
    public API sets it once, when the cache is made."""
    return getattr(cache, "layer_class_to_replicate", None)


def replicate_layer(cache: Any, make: Callable[..., Any]) -> None:
    """Let a cache make the layers that it lacks by ``make``."""
    cache.layer_class_to_replicate = make


def is_offloading(cache: Any) -> bool:
    """Whether a cache keeps its layers in another memory between their turns; said only to its maker."""
    return bool(getattr(cache, "offloading", False))


def caches_nothing(layer: Any) -> bool:
    """Whether this is the cache layer of a layer without a cache. Its class is not in every supported
    release, so it is known by its name."""
    return type(layer).__name__ == "DummyLayer"


# --- generation ------------------------------------------------------------------------------------------


def default_generation_settings() -> dict[str, Any]:
    """What ``generate`` takes for settings that nobody gives. The public ``GenerationConfig()`` has None for
    them."""
    return GenerationConfig._get_default_generation_params()
