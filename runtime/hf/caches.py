"""The caches of a patched model: made empty, taken apart to be saved, and filled again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, LinearAttentionLayer

from ...attention.errors import FarspanError
from ..layer import Layer
from ..mixers import Mixed
from ..session import Unique
from ..store.tree import joined
from .cache import CachePlan, KVStoreLayer, ShardStoreLayer, adopt_cache
from .mixers import StateLayer, adopt_states
from .mixers_in_place import mixers_of
from .models import ModelInfo, inspect_model
from .transformers_private import caches_nothing

_PLACE = "farspan_caches"  # the attribute of a patched model's decoder
_MADE_ANEW = ("store", "layout")  # attributes of a cache layer that are not saved as they are


@dataclass(eq=False)
class PatchedCaches(Unique):
    """What decides how the caches of a patched model are made and filled.

    layers, mixed: the patched layers and the mixers, by layer number. spec: the methods that ``patch`` was
    given. adapters: a digest of the adapters that the patch has put beside the weights; "" for none.
    """

    info: ModelInfo
    plan: CachePlan
    layers: Mapping[int, Layer]
    mixed: Mapping[int, Mixed]
    spec: str = ""
    adapters: str = ""

    def put(self) -> Callable[[], None]:
        """Let ``caches_of`` find this. Returns the undo step."""
        setattr(self.info.decoder, _PLACE, self)
        return lambda: delattr(self.info.decoder, _PLACE)

    def adopt(self, cache: Cache) -> None:
        """Give a cache the layers that the patch wants, in place."""
        adopt_cache(cache, self.plan)
        adopt_states(cache, {i: entry.mixer for i, entry in self.mixed.items()}, self.plan.count)

    def summarise(self, cache: Cache) -> None:
        """Complete the summaries of keys and values that decode reads, which its first call would do."""
        for index, layer in self.layers.items():
            for summary in layer.decode.summaries:
                kept = cache.layers[index]
                if isinstance(kept, KVStoreLayer) and summary.reads <= {"keys", "values"}:
                    kept.store.summarise(summary)

    def restored(self, layers: Sequence[Any], tensor: Callable[[str], Tensor]) -> Cache:
        """A cache with the contents that ``held`` has given for each layer, behind ``tree.split``. tensor:
        returns the tensor of a name. Raises FarspanError for layers of other kinds."""
        cache: Cache = DynamicCache(config=self.info.decoder.config)
        self.adopt(cache)
        adopt_states(cache, mixers_of(self.info.decoder), self.plan.count)
        if len(layers) != len(cache.layers):
            raise _of_other_layers()
        for layer, plain, device in zip(cache.layers, layers, self._devices(), strict=True):
            one = joined(plain, tensor, device)
            store = one["store"]
            if (store is not None) != isinstance(layer, KVStoreLayer):
                raise _of_other_layers()
            if store is None and one["kind"] != type(layer).__name__:
                raise _of_other_layers()
            vars(layer).update(one["attributes"])
            if isinstance(layer, KVStoreLayer):
                layer.store.restore(store)
        return cache

    def _devices(self) -> list[torch.device]:
        """The device of each layer: that of its first weight."""
        found: dict[int, torch.device] = {}
        for module in self.info.decoder.modules():
            index, weight = getattr(module, "layer_idx", None), next(module.parameters(), None)
            if isinstance(index, int) and weight is not None and not weight.is_meta:
                found.setdefault(index, weight.device)
        default = next((x for x in found.values()), torch.device("cpu"))
        return [found.get(i, default) for i in range(self.plan.count)]


def caches_of(model: nn.Module) -> PatchedCaches:
    """The caches of a patched model. Raises FarspanError for a model that is not patched."""
    found: PatchedCaches | None = vars(inspect_model(model).decoder).get(_PLACE)
    if found is None:
        raise FarspanError(
            "This model is not patched, and a saved cache belongs to a method: call farspan.patch first."
        )
    return found


def check_saveable(cache: Any) -> None:
    """Raise FarspanError for a cache over ranks and for one that no patched model has filled."""
    layers = getattr(cache, "layers", [])
    if any(isinstance(layer, ShardStoreLayer) for layer in layers):
        raise FarspanError("This cache is sharded over ranks, and a saved cache is that of one process.")
    if not any(isinstance(layer, KVStoreLayer) for layer in layers):
        raise FarspanError("This cache was not filled by a patched model, so it has no layer of farspan's.")


def held(cache: Cache) -> list[dict[str, Any]]:
    """What each layer of a cache holds, as ``tree.split`` takes it; tensors are views."""
    return [
        {
            "kind": type(layer).__name__,
            "attributes": {name: x for name, x in vars(layer).items() if name not in _MADE_ANEW},
            "store": layer.store.held() if isinstance(layer, KVStoreLayer) else None,
        }
        for layer in cache.layers
    ]


def length_of(cache: Cache) -> int:
    """The number of tokens that a cache holds; 0 where its layers hold different numbers, which a call that
    failed leaves behind."""
    lengths = {x.get_seq_length() for x in cache.layers if isinstance(x, KVStoreLayer | StateLayer)}
    return lengths.pop() if len(lengths) == 1 else 0


def crop_to(cache: Cache, length: int) -> None:
    """Keep the first ``length`` tokens of a cache. Raises FarspanError where a layer cannot be cropped; then
    nothing is left of the cache that could be used."""
    count = cache.get_seq_length() - length
    if count <= 0:
        return
    if not croppable(cache):
        raise FarspanError(
            "This cache has layers with a state over all tokens or a full sliding window, which cannot be "
            "cropped."
        )
    cache.crop(-count)


def copied(cache: Cache, length: int) -> Cache:
    """A copy of the first ``length`` tokens of a cache, in which keys and values have no room for the others.
    Raises FarspanError where a layer cannot be cropped."""
    views = [layer.store.views() for layer in cache.layers if isinstance(layer, KVStoreLayer)]
    cropped = copy.deepcopy(cache, {key: view for found in views for key, view in found.items()})
    crop_to(cropped, length)
    return copy.deepcopy(cropped)


def croppable(cache: Cache) -> bool:
    """Whether tokens can be taken off the end of a cache, as far as the kinds of its layers say. A store
    whose method has dropped keys may still refuse."""
    return all(map(_croppable, cache.layers))


def _croppable(layer: Any) -> bool:
    if isinstance(layer, StateLayer):
        return layer.is_croppable and not layer.padded_right
    if isinstance(layer, LinearAttentionLayer):
        return False
    if isinstance(layer, DynamicSlidingWindowLayer):
        return layer.get_seq_length() < layer.sliding_window
    return isinstance(layer, KVStoreLayer) or caches_nothing(layer)


def _of_other_layers() -> FarspanError:
    return FarspanError(
        "This cache was saved from a model with other kinds of layers, or under another release of "
        "transformers: build it again."
    )
