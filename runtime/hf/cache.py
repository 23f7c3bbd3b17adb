"""KVStores as transformers cache layers, and the conversion of a user's cache in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ...attention.errors import FarspanError
from ..cache import KVStore
from ..session import in_call
from ..shard import ShardStore, running
from ..static import Clock, StaticStore
from .interface import autocast
from .transformers_private import caches_nothing, is_offloading, replicate_layer, replicated_layer

H = TypeVar("H", bound="HybridStoreLayer")


class KVStoreLayer(DynamicLayer):
    """A KVStore as a transformers cache layer."""

    def __init__(self, **kwargs: Any) -> None:
        self.store = KVStore()
        super().__init__(**kwargs)

    # transformers reads and sets these as plain attributes
    @property
    def keys(self) -> Tensor | None:
        return None if self.store.kv is None else self.store.kv.k

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(value)

    @property
    def values(self) -> Tensor | None:
        return None if self.store.kv is None else self.store.kv.v

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign(value)

    @property
    def is_initialized(self) -> bool:
        return self.store.kv is not None

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        pass  # the store determines it

    @staticmethod
    def _assign(value: Tensor | None) -> None:
        if value is not None:
            raise FarspanError(
                "The keys or values of a farspan cache layer were assigned: change them by update, crop, "
                "reorder_cache or reset."
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.store.dropped and not in_call():
            self.store.require(None, self.store.total)
        key_states, value_states = autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(key_states, value_states)
        return self.store.handles()

    def get_seq_length(self) -> int:
        return self.store.total

    def reset(self) -> None:
        self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove; got {tokens_to_remove}.")
        self.store.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select(indices)

    def offload(self) -> None:
        raise FarspanError(
            "An offloaded cache was given, which farspan does not serve: pass no cache, or a DynamicCache "
            "without offloading."
        )

    prefetch = offload


class StaticStoreLayer(KVStoreLayer):
    """A StaticStore as a transformers cache layer. In a step of one token its ``update`` leaves the storing
    of the token to the attention of the layer."""

    def __init__(self, make: Callable[[], StaticStore], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.store: StaticStore = make()


class ShardStoreLayer(KVStoreLayer):
    """A ShardStore as a transformers cache layer. Its ``update`` returns the new keys and values unchanged;
    the attention of the layer stores this rank's part of them."""

    def __init__(self, make: Callable[[], ShardStore], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.store: ShardStore = make()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if running.get() is None:
            raise FarspanError(
                "This cache is sharded over ranks, but the model is not patched over these ranks: use the "
                "cache with the same patch, or start a new cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states


class HybridStoreLayer(KVStoreLayer, LinearAttentionAndFullAttentionLayer):
    """The cache layer of a decoder layer that has a recurrent mixer beside its attention (Falcon-H1)."""

    def __init__(self, number_of_states: int = 1, **kwargs: Any) -> None:
        self.store = KVStore()
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if args:
            KVStoreLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.store.reset()

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        KVStoreLayer.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.store.reorder(beam_idx)


class HybridShardStoreLayer(ShardStoreLayer, HybridStoreLayer):
    """The same over ranks: the keys are sharded, the states are the same on every rank."""


_KEPT = (
    KVStoreLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def adopt_cache(
    cache: Cache, shard: Callable[[int | None], ShardStore] | None = None, static: int | None = None
) -> None:
    """Replace the layers of a user's cache by farspan's, in place and with their contents. Raises
    FarspanError for a cache that cannot be converted.

    shard: for a cache that is sharded over ranks, makes the store of a layer; called with the layer's sliding
    window or None. static: the number of positions for which stores of fixed size are made; None: stores
    grow.
    """
    replicated = replicated_layer(cache)
    if is_offloading(cache) or not isinstance(getattr(cache, "layers", None), list):
        what = "an offloading cache" if isinstance(cache, Cache) else f"a {type(cache).__name__}"
        raise FarspanError(
            f"farspan serves transformers' DynamicCache, and {what} was given: pass no cache, or "
            "DynamicCache(config=...)."
        )
    _check_lengths(cache)
    kind: Any = replicated.func if isinstance(replicated, partial) else replicated
    if kind not in (None, DynamicLayer, KVStoreLayer, ShardStoreLayer, StaticStoreLayer):
        raise _wrong_cache(cache, kind)
    make = KVStoreLayer if static is None else _static_maker(cache, static)
    fresh: list[Any] = []
    for layer in cache.layers:
        if shard is not None:
            fresh.append(_sharded(cache, layer, shard))
        elif _settled(layer, static):
            fresh.append(layer)
        elif isinstance(layer, ShardStoreLayer):
            raise FarspanError(
                "This cache is sharded over ranks, but the model is patched without parallel=: use the cache "
                "with a patch that has the same parallel=, or start a new cache."
            )
        elif type(layer) in (DynamicLayer, KVStoreLayer, StaticStoreLayer):
            fresh.append(_filled(make(), layer))
        elif type(layer) is LinearAttentionAndFullAttentionLayer:
            fresh.append(_filled(_beside_states(HybridStoreLayer, KVStore(), layer), layer))
        elif isinstance(layer, _KEPT) or caches_nothing(layer):
            fresh.append(layer)
        else:
            raise _wrong_cache(cache, type(layer))
    cache.layers[:] = fresh
    if kind in (DynamicLayer, StaticStoreLayer) or (kind is KVStoreLayer and static is not None):
        replicate_layer(cache, make if shard is None else partial(ShardStoreLayer, partial(shard, None)))


def _settled(layer: Any, static: int | None) -> bool:
    """Whether a layer is farspan's and, as ``static`` of ``adopt_cache`` says, grows or has that many
    positions."""
    if static is None:
        return type(layer) is KVStoreLayer
    return isinstance(layer, StaticStoreLayer) and layer.store.room == static


def _static_maker(cache: Cache, room: int) -> Callable[[], StaticStoreLayer]:
    """A function that makes the layers of a cache with ``room`` positions, which share one clock."""
    stores = [layer.store for layer in cache.layers if isinstance(layer, StaticStoreLayer)]
    clock = stores[0].clock if stores else Clock()
    return partial(StaticStoreLayer, partial(StaticStore, room, clock))


def stored_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in a cache: of farspan's stores with their summaries and spare room, of
    other layers those of the tensors."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, KVStoreLayer):
            total += layer.store.nbytes
        elif isinstance(layer, DynamicLayer) and layer.is_initialized:
            total += layer.keys.nbytes + layer.values.nbytes
    return total


def _check_lengths(cache: Cache) -> None:
    """Raise FarspanError where some layers of a cache hold more positions than others. transformers crops
    layer by layer, so a crop that a layer refuses has already shortened the layers before it."""
    lengths = sorted({x.store.total for x in cache.layers if isinstance(x, KVStoreLayer)} - {0})
    if len(lengths) > 1:
        raise FarspanError(
            f"The layers of this cache hold {lengths[0]} to {lengths[-1]} tokens, because a crop or a call "
            "has failed in one of them: start a new cache."
        )


def _sharded(cache: Cache, layer: Any, shard: Callable[[int | None], ShardStore]) -> Any:
    if caches_nothing(layer) or (
        isinstance(layer, LinearAttentionLayer) and not isinstance(layer, DynamicLayer)
    ):
        return layer  # a state is the same on every rank
    if isinstance(layer, ShardStoreLayer):
        ranks, old = shard(None).ranks, layer.store.ranks
        if (ranks.size, ranks.rank) != (old.size, old.rank):
            raise FarspanError(
                f"This cache is sharded over {old.size} ranks and was made on rank {old.rank}; the patch has "
                f"{ranks.size} ranks, and this is rank {ranks.rank}: start a new cache."
            )
        layer.store.ranks = ranks  # the ranks of this patch, since removing a patch closes its ranks
        return layer
    window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
    if type(layer) in (LinearAttentionAndFullAttentionLayer, HybridStoreLayer):
        new: ShardStoreLayer = _beside_states(HybridShardStoreLayer, shard(None), layer)
    elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, KVStoreLayer):
        new = ShardStoreLayer(partial(shard, window))
    else:
        raise _wrong_cache(cache, type(layer))
    if layer.is_initialized and layer.get_seq_length() > 0:
        if window is not None:
            raise FarspanError(
                "A cache with sliding-window layers that was filled on one device cannot be sharded over "
                "ranks: start a new cache."
            )
        if isinstance(layer, KVStoreLayer):
            layer.store.require(None, layer.store.total)
        new.lazy_initialization(layer.keys, layer.values)
        new.store.take_shared(layer.keys, layer.values)
    return new


def _beside_states(kind: type[H], store: KVStore, layer: Any) -> H:
    """A layer of class ``kind`` with ``store``, and with the states of ``layer``."""
    new = kind.__new__(kind)
    new.store = store
    kept = {k: v for k, v in vars(layer).items() if k not in ("keys", "values", "is_initialized", "store")}
    new.__dict__.update(kept)
    return new


def _filled(new: KVStoreLayer, old: DynamicLayer) -> KVStoreLayer:
    if old.is_initialized and old.get_seq_length() > 0:
        if isinstance(old, KVStoreLayer):
            old.store.require(None, old.store.total)
        new.update(old.keys, old.values)
    return new


def _wrong_cache(cache: Cache, layer: type) -> FarspanError:
    return FarspanError(
        f"A {type(cache).__name__} with {layer.__name__}s was given, which farspan does not serve: pass no "
        "cache, or DynamicCache(config=model.config)."
    )
