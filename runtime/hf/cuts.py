"""Where a cache can be cut: the lengths to which it can be shortened, so that another text goes on there.

Each layer is asked. Stores of all keys can be cut anywhere. A recurrent state, a sliding window once it is
full, and a store that drops its oldest keys do not hold what they held before: they can be cut at a mark
alone, where a copy of them was made.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, LinearAttentionLayer

from ...attention.errors import FarspanError
from ..store.lasting import runs_lasting
from ..store.store import KVStore
from ..store.tree import bytes_of, copied
from .cache import KVStoreLayer
from .caches import attributes
from .mixers import StateLayer


@dataclass(frozen=True, eq=False)
class Mark:
    """Copies of what some layers of a cache held after its first ``length`` tokens, for a later ``cut``.

    layers, stores: by layer number, attributes of cache layers and stores that drop keys. They are never
    changed, so caches may share a mark.
    """

    length: int
    layers: Mapping[int, Mapping[str, Any]]
    stores: Mapping[int, KVStore]

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return bytes_of(self.layers) + sum(store.nbytes for store in self.stores.values())


_NOTHING = Mark(0, {}, {})


def needs_marks(cache: Cache) -> bool:
    """Whether a cache has layers that a mark copies. A sliding window is one before it is full, too."""
    return any(_has_state(layer) or _drops_keys(layer) for layer in cache.layers)


@runs_lasting
@torch.no_grad()
def mark(cache: Cache) -> Mark:
    """A mark at the end of a cache."""
    layers = dict(enumerate(cache.layers))
    return Mark(
        length_of(cache),
        {i: copied(attributes(layer)) for i, layer in layers.items() if _has_state(layer)},
        {i: copy.deepcopy(layer.store) for i, layer in layers.items() if _drops_keys(layer)},
    )


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


@runs_lasting
def cut(cache: Cache, length: int, marks: Sequence[Mark] = ()) -> None:
    """Keep the first ``length`` tokens of a cache: layers that are in the mark there become what they were,
    and the others are cropped. Raises FarspanError where a layer cannot be cut there, before anything is
    changed."""
    if why := _why_not(cache, length, marks):
        raise FarspanError(why)
    there = _at(length, marks)
    for index, layer in enumerate(cache.layers):
        if index in there.layers:
            vars(layer).update(copied(there.layers[index]))
        if index in there.stores:
            layer.store = copy.deepcopy(there.stores[index])
        elif isinstance(layer, KVStoreLayer):
            layer.store.crop(layer.store.total - length)
        elif index not in there.layers and _counts(layer) and layer.get_seq_length() > length:
            layer.crop(length - layer.get_seq_length())


@runs_lasting
def cut_copy(cache: Cache, length: int, marks: Sequence[Mark] = ()) -> Cache:
    """A copy of the first ``length`` tokens of a cache, as ``cut`` leaves them, in which keys and values have
    no room for the others. Raises FarspanError as ``cut`` does."""
    views = [layer.store.views() for layer in cache.layers if isinstance(layer, KVStoreLayer)]
    shared = copy.deepcopy(cache, {key: view for found in views for key, view in found.items()})
    cut(shared, length, marks)
    return copy.deepcopy(shared)


def forget_states(cache: Cache) -> None:
    """Let every method begin anew with the keys of a cache, as ``cut`` does where it shortens the cache."""
    for layer in cache.layers:
        if isinstance(layer, KVStoreLayer):
            layer.store.states.clear()


def _why_not(cache: Cache, length: int, marks: Sequence[Mark]) -> str:
    """Why a cache cannot be cut at ``length`` tokens; "" where it can."""
    there, whole = _at(length, marks), length_of(cache) == length
    for index, layer in enumerate(cache.layers):
        if (
            isinstance(layer, KVStoreLayer)
            and index not in there.stores
            and (why := layer.store.why_not_cropped(length))
        ):
            return why
        if not (whole or index in there.layers or index in there.stores or _has_all(layer, length)):
            return (
                f"This cache has layers with a state over all tokens or a full sliding window, which cannot "
                f"be cropped to {length} tokens."
            )
    return ""


def _has_state(layer: Any) -> bool:
    """Whether a layer has more than stored keys, and it does not grow with the tokens."""
    if isinstance(layer, StateLayer):
        return not layer.is_croppable or layer.padded_right
    return isinstance(layer, LinearAttentionLayer | DynamicSlidingWindowLayer)


def _drops_keys(layer: Any) -> bool:
    return isinstance(layer, KVStoreLayer) and layer.store.needed is not None


def _has_all(layer: Any, length: int) -> bool:
    """Whether a layer holds ``length`` tokens or more, each of them apart."""
    if _counts(layer) and layer.get_seq_length() < length:
        return False
    if isinstance(layer, DynamicSlidingWindowLayer) and not isinstance(layer, LinearAttentionLayer):
        return bool(layer.get_seq_length() < layer.sliding_window)
    return not _has_state(layer)


def _counts(layer: Any) -> bool:
    """Whether a layer counts its tokens."""
    return isinstance(layer, KVStoreLayer | StateLayer | DynamicSlidingWindowLayer)


def _at(length: int, marks: Sequence[Mark]) -> Mark:
    return next((one for one in marks if one.length == length), _NOTHING)
