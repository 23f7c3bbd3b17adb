"""Where a cache can be cut: the lengths to which it can be shortened, so that another text goes on from there.

Each layer is asked. Rows of keys and values can be cut anywhere. A recurrent state, and a sliding window once
it is full, hold no earlier tokens: they can be cut at a mark alone, where a copy of them was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, LinearAttentionLayer

from ...attention.errors import FarspanError
from ..store.lasting import runs_lasting
from ..store.tree import bytes_of, copied
from .cache import KVStoreLayer
from .caches import attributes
from .mixers import StateLayer
from .transformers_private import caches_nothing


@dataclass(frozen=True, eq=False)
class Mark:
    """Copies of what some layers of a cache held after its first ``length`` tokens, for a later ``cut``.

    layers: their attributes by layer number. They are never changed, so caches may share a mark.
    """

    length: int
    layers: Mapping[int, Mapping[str, Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return bytes_of(self.layers)


def needs_marks(cache: Cache) -> bool:
    """Whether a cache has layers that a mark copies: states, and sliding windows, which may become full."""
    return any(map(_marked, cache.layers))


@runs_lasting
@torch.no_grad()
def mark(cache: Cache) -> Mark:
    """A mark at the end of a cache."""
    held = {i: copied(attributes(layer)) for i, layer in enumerate(cache.layers) if _marked(layer)}
    return Mark(length_of(cache), held)


def length_of(cache: Cache) -> int:
    """The number of tokens that a cache holds; 0 where its layers hold different numbers, which a call that
    failed leaves behind."""
    lengths = {layer.get_seq_length() for layer in cache.layers if _counts(layer)}
    return lengths.pop() if len(lengths) == 1 else 0


def last_cut(cache: Cache, most: int, marks: Sequence[Mark] = (), step: int = 1) -> int:
    """The last cut of a cache at or before its first ``most`` tokens, at a multiple of ``step``; 0: none."""
    found = {most, length_of(cache), *(one.length for one in marks)}
    places = sorted({x - x % step for x in found if x <= most}, reverse=True)
    return next((x for x in places if not _why_not(cache, x, marks)), 0)


def cut(cache: Cache, length: int, marks: Sequence[Mark] = ()) -> None:
    """Keep the first ``length`` tokens of a cache, of layers that hold more of them or are in the mark there.
    Raises FarspanError where a layer cannot be cut there; the cache is as it was then."""
    if why := _why_not(cache, length, marks):
        raise FarspanError(why)
    held = _at(length, marks)
    for index, layer in enumerate(cache.layers):
        if index in held:
            vars(layer).update(copied(held[index]))
        if isinstance(layer, KVStoreLayer):
            layer.store.crop(layer.store.total - length)
        elif index not in held and _counts(layer) and layer.get_seq_length() > length:
            layer.crop(length - layer.get_seq_length())


def forget_states(cache: Cache) -> None:
    """Let every method begin anew with the keys of a cache, as ``cut`` does where it shortens the cache."""
    for layer in cache.layers:
        if isinstance(layer, KVStoreLayer):
            layer.store.states.clear()


def _why_not(cache: Cache, length: int, marks: Sequence[Mark]) -> str:
    """Why a cache cannot be cut at ``length`` tokens; "" where it can."""
    held = _at(length, marks)
    whole = length_of(cache) == length
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, KVStoreLayer) and (why := layer.store.why_not_cropped(length)):
            return why
        if not (whole or index in held or _cut_anywhere(layer, length)):
            return (
                f"This cache has layers with a state over all tokens or a full sliding window, which cannot "
                f"be cropped to {length} tokens."
            )
    return ""


def _cut_anywhere(layer: Any, length: int) -> bool:
    """Whether a layer can be cut at ``length`` without a mark."""
    if isinstance(layer, StateLayer):
        return layer.is_croppable and not layer.padded_right and layer.tokens_seen >= length
    if isinstance(layer, LinearAttentionLayer):
        return False
    if isinstance(layer, DynamicSlidingWindowLayer):
        return length <= layer.get_seq_length() < layer.sliding_window
    return isinstance(layer, KVStoreLayer) or caches_nothing(layer)


def _marked(layer: Any) -> bool:
    """Whether a mark has a copy of a layer, or of what it has beside its rows."""
    if isinstance(layer, StateLayer):
        return not layer.is_croppable
    return isinstance(layer, LinearAttentionLayer | DynamicSlidingWindowLayer)


def _counts(layer: Any) -> bool:
    """Whether a layer counts its tokens."""
    return isinstance(layer, KVStoreLayer | StateLayer | DynamicSlidingWindowLayer)


def _at(length: int, marks: Sequence[Mark]) -> Mapping[int, Mapping[str, Any]]:
    return next((one.layers for one in marks if one.length == length), {})
