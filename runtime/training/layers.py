"""The layers of a model whose modules a training teaches."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...attention.errors import FarspanError
from ...attention.method import AttentionMethod
from .. import hf
from ..recipe import Recipe


def layers_to_train(
    info: hf.ModelInfo, method: AttentionMethod, start: Recipe | None
) -> dict[int, AttentionMethod]:
    """By layer, ``method`` with a module to train, on the layer's device. start: a recipe whose weights
    training begins with, in place of new ones.

    Raises FarspanError for a method that trains no layer of the model, for a model whose heads are sharded,
    and for a recipe that does not fit."""
    if info.weights_mesh is not None:
        raise FarspanError(
            "The heads of this model are sharded by tensor parallelism: train on the whole model in one "
            "process, or on several by data parallelism (torchrun)."
        )
    layers: dict[int, AttentionMethod] = {}
    for index, module in info.attention.items():
        if info.kinds[index] == hf.SLIDING:
            continue  # its window is the model's own, and no method serves it
        layer = info.layer_info(index)
        made = method.for_training(layer)
        if made is None:
            continue
        assert made.module is not None, "a method that is trained owns a module"
        if start is not None:
            weights = start.for_layer(method, layer, info.geometry).weights or {}
            _load(made.module, weights, index)
        hf.place_beside(made.module, module)
        layers[index] = made
    if not layers:
        raise FarspanError(f"{method} leaves every layer of this model dense, so it has nothing to train.")
    return layers


def _load(module: nn.Module, weights: Any, index: int) -> None:
    own = {name: list(x.shape) for name, x in module.state_dict().items()}
    given = {name: list(x.shape) for name, x in weights.items()}
    if own != given:
        raise FarspanError(
            f"The recipe that training starts from has {given} in layer {index}, and the method has {own}: "
            "give a recipe of the same method and parameters."
        )
    module.load_state_dict(dict(weights))
