"""Converted models as transformers models: classes that make their mixers, and the configs that name them.

``FarspanLlamaForCausalLM`` is ``LlamaForCausalLM`` with the mixers that its config lists. Its attributes, its
state dict, ``from_pretrained``, ``save_pretrained`` and ``generate`` are those of the original. A folder of
such a model has a ``model_type`` and layer types that transformers does not know, so that transformers alone
refuses it; it would otherwise run the weights of mixers as attention.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ...attention.errors import FarspanError, Unsupported
from ...attention.hybrid.mixer import Mixer
from ...attention.hybrid.registry import parse_mixer
from .mixers_in_place import mixers_of, settle
from .models import FULL, MIXERS, SLIDING, ModelInfo, inspect_model
from .projections import geometry_of
from .tiny import own_class, owner

_PREFIX, _TYPE = "Farspan", "farspan_"
_LAYER = "farspan_linear_attention"  # the type of a mixer's layer in a saved config


class ConvertedConfig:
    """What the config of a converted model adds to that of the original: ``farspan_mixers``, a list with the
    spec of each layer's mixer, None where the layer has its attention."""

    def to_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        name = _layer_types(type(self))
        if kinds := saved.get(name):
            specs = saved[MIXERS]
            saved[name] = [_LAYER if spec else kind for kind, spec in zip(kinds, specs, strict=True)]
        return saved

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        name = _layer_types(cls)
        if kinds := config_dict.get(name):
            config_dict = {**config_dict, name: [FULL if kind == _LAYER else kind for kind in kinds]}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


def _layer_types(config: type[Any]) -> str:
    """The name under which configs of this class save the types of their layers (Nemotron-H has another)."""
    name: str = config.attribute_map.get("layer_types", "layer_types")
    return name


class ConvertedModel:
    """What the class of a converted model adds to the original: it makes the mixers of its config.

    made_by: the spec of each mixer, and the geometry of the attention that it replaces, by layer.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        info = inspect_model(self)
        self.made_by = {i: (spec, geometry_of(info, i)) for i, spec in specs_of(config).items()}
        settle(info, {i: parse_mixer(*made) for i, made in self.made_by.items()})

    def initialize_weights(self) -> None:
        """Called by transformers when tensors are in no file. Mixers may have buffers that are never saved:
        they get the values of a new mixer."""
        super().initialize_weights()  # type: ignore[misc]
        made = getattr(self, "made_by", {})  # it is called while the original is made, too
        for index, mixer in mixers_of(self.get_decoder()).items() if made else ():  # type: ignore[attr-defined]
            with torch.device("cpu"):
                fresh = dict(parse_mixer(*made[index]).named_buffers())
            saved = mixer.state_dict()
            for name, buffer in mixer.named_buffers():
                if name not in saved and not buffer.is_meta:
                    buffer.copy_(fresh[name])


def specs_of(config: Any) -> dict[int, str]:
    """The specs of the mixers of a converted model by layer; empty for any other model."""
    return {i: spec for i, spec in enumerate(getattr(config, MIXERS, None) or ()) if spec}


def converted_class(original: type[Any]) -> type[Any]:
    """The class of models of class ``original`` with mixers."""
    return _class(original.__name__)


def converted_config(info: ModelInfo, specs: Mapping[int, str]) -> Any:
    """The config of ``info.model`` with the mixers ``specs`` by layer. Raises Unsupported for a model that
    is not a text model of a class of transformers itself, and for layers without full attention."""
    model, kinds = owner(info), info.kinds
    reasons = []
    kind = own_class(model)
    if getattr(transformers, kind.__name__, None) is not kind:
        reasons.append("its class is not one of transformers' own")
    if model.config is not info.config:
        reasons.append("it is not a text model alone")
    if left := sorted(i for i in specs if i not in info.attention or kinds[i] != FULL):
        reasons.append(f"its layers {left} have no full attention")
    if reasons:
        raise Unsupported(f"farspan cannot convert a {type(info.model).__name__}", reasons)
    saved = {k: v for k, v in info.config.to_dict().items() if k not in ("model_type", "architectures")}
    if set(kinds) <= {FULL, SLIDING}:
        saved["layer_types"] = kinds
    made = converted_class(kind).config_class
    return made.from_dict({**saved, MIXERS: [specs.get(i) for i in range(len(kinds))]})


def empty_converted(info: ModelInfo, specs: Mapping[int, str]) -> Any:
    """``info.model`` with the mixers ``specs`` by layer, on torch's meta device and without weights. Raises
    Unsupported where it cannot be made."""
    config = converted_config(info, specs)
    try:
        with torch.device("meta"):
            return converted_class(own_class(owner(info)))(config)
    except FarspanError:
        raise
    except Exception as error:  # a class may raise anything about a config
        reason = f"its class cannot be made with mixers ({type(error).__name__}: {error})"
        raise Unsupported(f"farspan cannot convert a {type(info.model).__name__}", [reason]) from error


def save_converted(info: ModelInfo, mixers: Mapping[int, Mixer], spec: str, folder: Path) -> None:
    """Save ``info.model`` with ``mixers`` of ``spec`` in place of the attention of their layers, in the
    layout of ``save_pretrained``."""
    model = owner(info)
    made = empty_converted(info, dict.fromkeys(mixers, spec))
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for index, mixer in mixers.items():
        path = next(name for name, m in model.named_modules() if m is info.attention[index])
        for name in [name for name in tensors if name.startswith(f"{path}.")]:
            del tensors[name]
        tensors |= {f"{path}.{name}": x for name, x in mixer.state_dict().items()}
    made.load_state_dict(tensors, assign=True)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = model.generation_config
    made.save_pretrained(folder)


def read_config(target: str | Path) -> Any:
    """The config of a folder or hub id, of a converted model too."""
    try:
        return AutoConfig.from_pretrained(target)
    except ValueError as error:
        found, _ = PreTrainedConfig.get_config_dict(target)
        if not str(found.get("model_type", "")).startswith(_TYPE):
            raise
        return _config_class(target, found.get("architectures") or ["nothing"], error).from_dict(found)


def class_of_config(config: Any) -> type[Any] | None:
    """The class of the converted model with this config; None for the config of any other model."""
    return _class(config.architectures[0].removeprefix(_PREFIX)) if specs_of(config) else None


def _config_class(target: str | Path, architectures: Sequence[str], error: Exception) -> type[Any]:
    name = architectures[0]
    if name.startswith(_PREFIX) and hasattr(transformers, name.removeprefix(_PREFIX)):
        found: type[Any] = _class(name.removeprefix(_PREFIX)).config_class
        return found
    raise FarspanError(
        f"{target} was converted by farspan from a class that the installed transformers does not have "
        f"({name}): install the transformers that it was converted with."
    ) from error


@functools.cache
def _class(original: str) -> type[Any]:
    """The class ``Farspan<original>``: of a config, or of a model."""
    base = getattr(transformers, original)
    own: dict[str, Any] = {"__module__": __name__, "__doc__": f"{original} with mixers of farspan."}
    if issubclass(base, PreTrainedConfig):
        own["model_type"] = _TYPE + base.model_type
        return type(_PREFIX + original, (ConvertedConfig, base), own)
    assert issubclass(base, PreTrainedModel)
    own |= {"config_class": _class(base.config_class.__name__), "_is_stateful": True}
    return type(_PREFIX + original, (ConvertedModel, base), own)


def __getattr__(name: str) -> Any:
    """The classes by name, so that converted models can be pickled."""
    if name.startswith(_PREFIX) and hasattr(transformers, name.removeprefix(_PREFIX)):
        return _class(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
