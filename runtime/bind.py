"""Bind methods to the layers of a model, with the recipes that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attention.dense import Dense
from ..attention.digest import weights_digest
from ..attention.errors import FarspanError, Unsupported
from ..attention.kv import KV
from ..attention.method import DECODE, PREFILL, AttentionMethod, LayerInfo
from ..attention.sources import IN_NO_CACHE
from .recipe import Recipe
from .shipped import recipe_folders, shipped
from .store.memory import Memory
from .store.storage import Storage


def check_recipe(
    recipe: Recipe | str | Path | None,
    chosen: Sequence[tuple[AttentionMethod, AttentionMethod]],
    geometry: dict[str, Any],
) -> None:
    """Raise FarspanError for a recipe that several methods need, and for a recipe without adapters that no
    method needs. A method with a shipped recipe needs only one of its own."""
    if recipe is None:
        return
    methods = [method for pair in chosen for method in pair]
    need = [method for method in methods if method.needs.recipe]
    lacking = [method for method in need if not method.recipe]
    served = {method.name for method in lacking if shipped(method, geometry) is not None}
    if served and not trained_under(recipe):
        name = _opened(recipe).method
        if name not in {method.name for method in need}:
            raise FarspanError(
                f"This recipe is for {name}, not for {' or '.join(sorted(served))}, whose recipe is shipped "
                "with farspan: leave recipe out, or give one made for it."
            )
    if served and len({method.name for method in lacking}) > 1:
        served -= {_opened(recipe).method}
        lacking = [method for method in lacking if method.name not in served]
    lack = list(dict.fromkeys(method.name for method in lacking))
    if len(lack) > 1:
        joint = " + " if any([method.name for method in pair] == lack for pair in chosen) else "' and '"
        raise FarspanError(
            f"recipe= names one recipe, but {' and '.join(lack)} need one each: name each in its spec, as "
            f"'{joint.join(f'{name}:recipe=PATH' for name in lack)}'."
        )
    if not need and not trained_under(recipe):
        names = sorted({method.name for method in methods if method.selective}) or ["dense"]
        raise FarspanError(
            f"A recipe was given, but no method needs one ({' and '.join(names)}): leave recipe out."
        )


def takes(method: AttentionMethod, recipe: Recipe | str | Path | None) -> bool:
    """Whether ``patch(recipe=...)`` uses a recipe for ``method``: for its weights, or for adapters that were
    trained under it. A method with shipped recipes takes none of another method."""
    if recipe is None:
        return False
    if method.needs.recipe and method.name in recipe_folders():
        return _opened(recipe).method == method.name
    return method.needs.recipe or trained_under(recipe, method)


def trained_under(recipe: Recipe | str | Path, method: AttentionMethod | None = None) -> bool:
    """Whether a recipe has adapters that were trained under ``method`` (None: any). One that cannot be read
    has none."""
    try:
        found = _opened(recipe)
    except FarspanError:
        return False
    return bool(found.adapters) and (method is None or method.name == found.method)


def check_no_decode(model: str, chosen: Sequence[tuple[AttentionMethod, AttentionMethod]]) -> None:
    """Raise Unsupported for a decode method on a model in which every call is a prefill. A method of both
    phases is allowed: its prefill runs."""
    dense = Dense()
    never = sorted({str(decode) for prefill, decode in chosen if decode not in (prefill, dense)})
    if never:
        raise Unsupported(
            f"farspan cannot run {' and '.join(never)} at decode on {model}",
            [
                "its attention is called with keys that are not those of the cache, so every call is a "
                "prefill: choose a prefill method or dense"
            ],
        )


def check_evicting(
    prefill: AttentionMethod, decode: AttentionMethod, storage: Storage, over_ranks: bool
) -> None:
    """Raise Unsupported where the keys of a layer that ``decode`` evicts cannot be dropped."""
    if not decode.evict:
        return
    reasons = []
    if over_ranks and decode.evicts_in_some_heads:
        reasons.append("over ranks all KV heads of a layer hold equally many keys")
    if storage.format is not KV or storage.packing is not None or type(storage.memory) is not Memory:
        reasons.append(f"no single key can be dropped from a cache stored as {storage}")
    if prefill.needs.inputs or any(summary.reads & IN_NO_CACHE for summary in prefill.summaries):
        reasons.append(f"{prefill} needs more of evicted tokens in a further prompt than is in a cache")
    if reasons:
        raise Unsupported(
            f"farspan cannot run {decode} with evict=true", [f"{x}: give evict=false" for x in reasons]
        )


def check_all_run(
    chosen: Sequence[tuple[AttentionMethod, AttentionMethod]],
    served: Mapping[int, tuple[AttentionMethod, AttentionMethod, Any]],
) -> None:
    """Raise FarspanError for a chosen method that no layer of ``served`` runs."""
    for place in (0, 1):
        for method in {str(chosen[i][place]): chosen[i][place] for i in served}.values():
            if not any(chosen[i][place] == method and served[i][place].name == method.name for i in served):
                raise FarspanError(
                    f"No layer of this model runs {method}, because of its parameters or its recipe, and "
                    "strict=True forbids that: change them, or leave strict out."
                )


def bind(
    methods: tuple[AttentionMethod, AttentionMethod],
    layer: LayerInfo,
    recipe: Recipe | str | Path | None,
    geometry: dict[str, Any],
) -> tuple[AttentionMethod, AttentionMethod, dict[str, str]]:
    """(prefill method, decode method, reasons), both methods bound to ``layer``. reasons: by phase, why the
    layer stays dense."""
    bound: list[AttentionMethod] = []
    reasons: dict[str, str] = {}
    for phase, method in zip((PREFILL, DECODE), methods, strict=True):
        if bound and method is methods[0] and not reasons:
            bound.append(bound[0])  # both phases share the parameters of a gate
            continue
        served = serve(method, layer, recipe, geometry)
        if served is None:
            reasons[phase] = f"{method.name} leaves this layer dense"
        bound.append(served or Dense())
    return bound[0], bound[1], reasons


def weighed(method: AttentionMethod) -> tuple[object, ...]:
    """A value that describes a method and its weights. Two methods are equal if the texts of their values
    are."""
    own = {name: x for name, x in vars(method).items() if isinstance(x, Tensor)}
    if method.module is not None:
        own |= {f"module.{name}": x for name, x in method.module.state_dict().items()}
    inner = [weighed(x) for x in vars(method).values() if isinstance(x, AttentionMethod)]
    return (str(method), [summary.key for summary in method.summaries], weights_digest(own), inner)


def serve(
    method: AttentionMethod, layer: LayerInfo, recipe: Recipe | str | Path | None, geometry: dict[str, Any]
) -> AttentionMethod | None:
    """``method`` bound to ``layer``, with its weights from the recipe; None where it leaves the layer dense.

    Raises Unsupported for a method that decides for all heads of a layer, where tensor parallelism shards
    them.
    """
    if method.couples_heads and layer.tp_size > 1:
        raise Unsupported(
            f"farspan cannot run {method} on a model whose heads are sharded by tensor parallelism",
            ["it makes one decision for all heads of a layer, and each rank has only some of them"],
        )
    inner = None
    if method.over is not None:
        inner = learned(method.over, layer, None, geometry, within=method.name).weights
    return method.for_layer(replace(learned(method, layer, recipe, geometry), over_weights=inner))


def learned(
    method: AttentionMethod,
    layer: LayerInfo,
    recipe: Recipe | str | Path | None,
    geometry: dict[str, Any],
    *,
    within: str = "",
) -> LayerInfo:
    """``layer`` with the tensors of the recipe that ``method`` needs; unchanged for a method that needs none.
    within: the name of the method whose ``over`` is ``method``; "" where there is none."""
    if not method.needs.recipe:
        return layer
    source = method.recipe or recipe  # the recipe in the spec comes first: two methods may need one each
    if source is not None and _opened(source).has_adapters_alone:
        source = None
    if not method.recipe and (source is None or _opened(source).method != method.name):
        source = shipped(method, geometry) or source
    if source is None:
        how = f"'{within}:over=({method.name}:recipe=PATH)'" if within else method.recipe_given
        raise FarspanError(
            f"{method.name} needs a recipe: make one with {method.recipe_maker} and pass {how}."
        )
    return _opened(source).for_layer(method, layer, geometry)


def _opened(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
