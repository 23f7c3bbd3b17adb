"""KVStores as transformers cache layers, and the conversion of a user's cache in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from ...parallel.group.comm import Ranks
from ..session import in_call
from ..store.shard import ShardStore, running
from ..store.static import Clock, StaticStore
from ..store.storage import DEVICE, Storage
from ..store.store import KVStore
from ..store.tree import bytes_of
from .interface import autocast
from .transformers_private import caches_nothing, is_offloading, replicated_layer

H = TypeVar("H", bound="HybridStoreLayer")


class KVStoreLayer(DynamicLayer):
    """A KVStore, which ``make`` makes, as a transformers cache layer."""

    def __init__(self, make: Callable[[], KVStore] = KVStore, **kwargs: Any) -> None:
        self.store = make()
        super().__init__(**kwargs)

    # transformers reads and sets these as plain attributes
    @property
    def keys(self) -> Tensor | None:
        return None if self.store.kv is None else self.store.kv.on_device().k

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign(value)

    @property
    def values(self) -> Tensor | None:
        return None if self.store.kv is None else self.store.kv.on_device().v

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
        if not in_call():
            self.store.require(None, self.store.total)
        key_states, value_states = autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(key_states, value_states)
        if in_call():
            return self.store.handles()
        kv = self.store.kv  # for a model that is not patched
        assert kv is not None
        return kv.on_device().dense()

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

    store: StaticStore


class ShardStoreLayer(KVStoreLayer):
    """A ShardStore as a transformers cache layer. Its ``update`` returns the new keys and values unchanged;
    the attention of the layer stores this rank's part of them."""

    store: ShardStore

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


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The stores that the caches of a patch have.

    count: number of layers of the model.
    storages: by layer; one that is not named keeps plain numbers on the device.
    ranks, block: the ranks over which a cache is sharded, in blocks of so many positions; None: one device.
    room: the positions for which stores of fixed size are made; None: stores grow.
    """

    count: int
    storages: Mapping[int, Storage] = field(default_factory=dict)
    ranks: Ranks | None = None
    block: int = 0
    room: int | None = None

    def storage(self, index: int) -> Storage:
        """That of a layer."""
        return self.storages.get(index, DEVICE)

    def sharded(self, index: int, window: int | None = None) -> ShardStore:
        """A store of a layer over ranks. window: the layer's own sliding window."""
        assert self.ranks is not None
        return ShardStore(self.ranks, self.block, window, self.storage(index))

    def layer(self, index: int, clock: Clock) -> KVStoreLayer:
        """An empty cache layer. clock: that of the cache, for stores of fixed size."""
        if self.ranks is not None:
            return ShardStoreLayer(partial(self.sharded, index))
        if self.room is not None:
            return StaticStoreLayer(partial(StaticStore, self.room, clock))
        return KVStoreLayer(partial(KVStore, self.storage(index)))

    def made(self, layer: Any, index: int) -> bool:
        """Whether a layer of a cache on one device is as this plan wants it."""
        if self.room is None:
            return type(layer) in (KVStoreLayer, HybridStoreLayer) and (
                layer.store.storage == self.storage(index)
            )
        return isinstance(layer, StaticStoreLayer) and layer.store.room == self.room


def adopt_cache(cache: Cache, plan: CachePlan) -> None:
    """Replace the layers of a user's cache by those of ``plan``, in place and with their contents, and make
    those that are missing. Raises FarspanError for a cache that cannot be converted."""
    replicated = replicated_layer(cache)
    if is_offloading(cache) or not isinstance(getattr(cache, "layers", None), list):
        what = "an offloading cache" if isinstance(cache, Cache) else f"a {type(cache).__name__}"
        raise FarspanError(
            f"farspan serves transformers' DynamicCache, and {what} was given: pass no cache, or "
            "DynamicCache(config=...)."
        )
    _check_lengths(cache)
    if replicated not in (None, DynamicLayer):
        raise _wrong_cache(cache, replicated)
    clocks = [layer.store.clock for layer in cache.layers if isinstance(layer, StaticStoreLayer)]
    clock = clocks[0] if clocks else Clock()
    cache.layers[:] = [_adopted(cache, x, i, plan, clock) for i, x in enumerate(cache.layers)]
    if replicated is not None:
        cache.layers += [plan.layer(i, clock) for i in range(len(cache.layers), plan.count)]


def _adopted(cache: Cache, layer: Any, index: int, plan: CachePlan, clock: Clock) -> Any:
    """``layer`` of a cache as ``plan`` wants it."""
    if plan.ranks is not None:
        return _sharded(cache, layer, index, plan)
    if plan.made(layer, index):
        return layer
    if isinstance(layer, ShardStoreLayer):
        raise FarspanError(
            "This cache is sharded over ranks, but the model is patched without parallel=: use the cache "
            "with a patch that has the same parallel=, or start a new cache."
        )
    if type(layer) in (DynamicLayer, KVStoreLayer, StaticStoreLayer):
        return _filled(plan.layer(index, clock), layer)
    if type(layer) in (LinearAttentionAndFullAttentionLayer, HybridStoreLayer):
        return _filled(_beside_states(HybridStoreLayer, KVStore(plan.storage(index)), layer), layer)
    if isinstance(layer, _KEPT) or caches_nothing(layer):
        return layer
    raise _wrong_cache(cache, type(layer))


def stored_by_tier(cache: Cache) -> Counter[str]:
    """Bytes of a cache by the tier of the memory: farspan's stores with their summaries and spare room; other
    keys and values, and states, are on the device."""
    tiers: Counter[str] = Counter()
    for layer in cache.layers:
        if isinstance(layer, KVStoreLayer):
            tiers.update(layer.store.tiers)
        tiers["device"] += bytes_of({name: x for name, x in vars(layer).items() if name != "store"})
    return tiers


def stored_bytes(cache: Cache) -> int:
    """The sum of ``stored_by_tier``."""
    return stored_by_tier(cache).total()


def _check_lengths(cache: Cache) -> None:
    """Raise FarspanError where some layers of a cache hold more positions than others. transformers crops
    layer by layer, so a crop that a layer refuses has already shortened the layers before it."""
    lengths = sorted({x.store.total for x in cache.layers if isinstance(x, KVStoreLayer)} - {0})
    if len(lengths) > 1:
        raise FarspanError(
            f"The layers of this cache hold {lengths[0]} to {lengths[-1]} tokens, because a crop or a call "
            "has failed in one of them: start a new cache."
        )


def _sharded(cache: Cache, layer: Any, index: int, plan: CachePlan) -> Any:
    if caches_nothing(layer) or (
        isinstance(layer, LinearAttentionLayer) and not isinstance(layer, DynamicLayer)
    ):
        return layer  # a state is the same on every rank
    if isinstance(layer, ShardStoreLayer):
        ranks, old = plan.ranks, layer.store.ranks
        assert ranks is not None
        if (ranks.size, ranks.rank) != (old.size, old.rank):
            raise FarspanError(
                f"This cache is sharded over {old.size} ranks and was made on rank {old.rank}; the patch has "
                f"{ranks.size} ranks, and this is rank {ranks.rank}: start a new cache."
            )
        layer.store.ranks = ranks  # the ranks of this patch, since removing a patch closes its ranks
        return layer
    window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
    if type(layer) in (LinearAttentionAndFullAttentionLayer, HybridStoreLayer):
        new: ShardStoreLayer = _beside_states(HybridShardStoreLayer, plan.sharded(index), layer)
    elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, KVStoreLayer):
        new = ShardStoreLayer(partial(plan.sharded, index, window))
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
