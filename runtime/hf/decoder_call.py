"""The arguments of a call of a decoder, by name, its tokens, and the cache that it will use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .releases import CACHE_NAMES, cache_name, given_cache


def arguments(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of ``decoder(*args, **kwargs)`` by their names."""
    if not args:
        return dict(kwargs)
    call = dict(inspect.signature(type(decoder).forward).bind_partial(decoder, *args, **kwargs).arguments)
    call.pop("self", None)
    for name in ("kwargs", "args"):
        call.update(call.pop(name, None) or {})
    return call


def tokens_of(call: Mapping[str, Any]) -> Tensor | None:
    """The tokens of a call: ids [B, T] or embeddings [B, T, hidden]; None without either."""
    ids: Tensor | None = call.get("input_ids")
    return call.get("inputs_embeds") if ids is None else ids


def settle_cache(decoder: Any, call: dict[str, Any]) -> Cache | None:
    """Make the cache that the decoder would make itself, and leave it in ``call`` under one name. Returns the
    cache of the call; None where it keeps none."""
    use_cache = call.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", False)
    if decoder.training and getattr(decoder, "gradient_checkpointing", False):
        use_cache = False  # the model switches the cache off in this case
    cache: Cache | None = given_cache(call)
    for name in CACHE_NAMES:  # keep one name only: where both are given, transformers drops the older one
        call.pop(name, None)
    if cache is None and use_cache:
        cache = DynamicCache(config=decoder.config)
    if cache is not None:
        call[cache_name(decoder)] = cache
    return cache
