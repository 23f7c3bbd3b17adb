"""The caches of a patched model: made empty, taken apart to be saved, and filled again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ...attention.errors import FarspanError
from ..layer import Layer
from ..mixers import Mixed
from ..session import Unique
from ..store.tree import joined
from .cache import CachePlan, KVStoreLayer, ShardStoreLayer, adopt_cache
from .mixers import adopt_states
from .mixers_in_place import mixers_of
from .models import ModelInfo, inspect_model

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

    def empty(self) -> Cache:
        """A cache without tokens, with the layers that the patch wants."""
        cache: Cache = DynamicCache(config=self.info.decoder.config)
        self.adopt(cache)
        adopt_states(cache, mixers_of(self.info.decoder), self.plan.count)
        for index, layer in self.layers.items():
            kept, needed = cache.layers[index], layer.layer_call.needed
            if isinstance(kept, KVStoreLayer) and needed is not None:
                kept.store.needed = needed
        return cache

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
        cache = self.empty()
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
            "attributes": attributes(layer),
            "store": layer.store.held() if isinstance(layer, KVStoreLayer) else None,
        }
        for layer in cache.layers
    ]


def attributes(layer: Any) -> dict[str, Any]:
    """What a layer of a cache holds beside farspan's store; tensors are its own."""
    return {name: x for name, x in vars(layer).items() if name not in _MADE_ANEW}


def _of_other_layers() -> FarspanError:
    return FarspanError(
        "This cache was saved from a model with other kinds of layers, or under another release of "
        "transformers: build it again."
    )
