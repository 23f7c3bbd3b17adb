"""Methods bound to the layers of a model, with the recipes that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attention.dense import Dense
from ..attention.errors import FarspanError, Unsupported
from ..attention.method import DECODE, PREFILL, AttentionMethod, LayerInfo
from .recipe import Recipe


def check_recipe(
    recipe: Recipe | str | Path | None, chosen: Sequence[tuple[AttentionMethod, AttentionMethod]]
) -> None:
    """Raise FarspanError for one recipe for several methods, and for one that no method takes."""
    if recipe is None:
        return
    methods = [method for pair in chosen for method in pair]
    need = [method for method in methods if method.needs.recipe]
    lack = list(dict.fromkeys(method.name for method in need if not method.recipe))
    if len(lack) > 1:
        joint = " + " if any([method.name for method in pair] == lack for pair in chosen) else "' and '"
        raise FarspanError(
            f"{' and '.join(lack)} need a recipe each, and recipe= is one: name each in its spec, as "
            f"'{joint.join(f'{name}:recipe=PATH' for name in lack)}'."
        )
    if not need:
        names = sorted({method.name for method in methods if method.selective}) or ["dense"]
        raise FarspanError(
            f"A recipe was given that no method takes: {' and '.join(names)} needs none; leave it out."
        )


def bind(
    methods: tuple[AttentionMethod, AttentionMethod],
    layer: LayerInfo,
    recipe: Recipe | str | Path | None,
    geometry: dict[str, Any],
) -> tuple[AttentionMethod, AttentionMethod, dict[str, str]]:
    """Both methods as ``layer`` runs them, and by phase why one leaves it dense."""
    bound: list[AttentionMethod] = []
    reasons: dict[str, str] = {}
    for phase, method in zip((PREFILL, DECODE), methods, strict=True):
        if bound and method is methods[0] and not reasons:
            bound.append(bound[0])  # a gate of both phases has its parameters once
            continue
        served = serve(method, layer, recipe, geometry)
        if served is None:
            reasons[phase] = f"{method.name} leaves this layer dense"
        bound.append(served or Dense())
    return bound[0], bound[1], reasons


def weighed(method: AttentionMethod) -> tuple[object, ...]:
    """A method with the weights that a recipe has given it: equal texts of this mean equal methods."""
    weights = [
        x.tolist() if isinstance(x, Tensor) else weighed(x)
        for x in vars(method).values()
        if isinstance(x, Tensor | AttentionMethod)
    ]
    if method.module is not None:
        weights += [x.tolist() for x in method.module.state_dict().values()]
    return (str(method), [summary.key for summary in method.summaries], weights)


def serve(
    method: AttentionMethod, layer: LayerInfo, recipe: Recipe | str | Path | None, geometry: dict[str, Any]
) -> AttentionMethod | None:
    """``method`` as ``layer`` runs it, its weights taken from the recipe; None where it leaves the layer
    dense."""
    if method.couples_heads and layer.tp_size > 1:
        raise Unsupported(
            f"farspan cannot run {method} on a model whose heads are shared out by tensor parallelism",
            ["it decides for all heads of a layer together, and each rank holds only some of them"],
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
    within: the name of the method that goes over it, if one does."""
    if not method.needs.recipe:
        return layer
    source = method.recipe or recipe  # its own comes first: two methods may need one each
    if source is None:
        own = f"{method.name}:recipe=PATH"
        how = f"'{within}:over=({own})'" if within else f"recipe=PATH, or '{own}'"
        raise FarspanError(
            f"{method.name} needs a calibration recipe: make one with 'farspan calibrate --method "
            f"{method.name}' (or farspan.calibrate) and pass {how}."
        )
    loaded = source if isinstance(source, Recipe) else Recipe.load(source)
    return loaded.for_layer(method.name, layer, geometry)
