"""Models from their config, without weights: for planning, and for a trial of a model's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ...parallel.planner.job import LayerShape, ModelShape
from ..mixers import state_growth
from ..models import errors_as_sentences, positions, quiet, resolve
from ..rope import can_stretch
from .converted import class_of_config, read_config
from .mixers_in_place import mixers_of
from .models import SLIDING, STATELESS, ModelInfo, inspect_model, layer_configs
from .transformers_private import layer_types

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MLP = ("intermediate_size", "ffn_dim", "n_inner")


def empty_model(name_or_path: str | Path) -> Any:
    """The model of an alias, a local folder or a hub id, on torch's meta device, without weights. For a hub
    id only config.json is fetched. Raises FarspanError where the model cannot be found or read."""
    target = resolve(name_or_path)
    with errors_as_sentences(str(name_or_path), target), quiet():
        config = read_config(target)
        own = class_of_config(config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config) if own is None else own(config)


def empty_llama() -> Any:
    """A Llama on torch's meta device, without weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=128))


def read_shape(name_or_path: str | Path, dtype: str = "auto") -> ModelShape:
    """The shape of the model of an alias, a local folder or a hub id. Parameters are counted.

    dtype: the name of a torch dtype, or "auto": the dtype of the config, bfloat16 where it names none.

    Raises FarspanError where the model cannot be found or read, and Unsupported where farspan cannot serve
    it.
    """
    model = empty_model(name_or_path)
    info = inspect_model(model)
    mixers = mixers_of(info.decoder)
    replaced = [geometry for _, geometry in model.made_by.values()] if mixers else []
    saved = getattr(model.config, "dtype", None) or getattr(info.config, "dtype", None) or torch.bfloat16
    chosen = saved if dtype == "auto" else getattr(torch, dtype)
    chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    size = chosen.itemsize
    growth = round(sum(state_growth(mixer.to(chosen)) for mixer in mixers.values()))
    return ModelShape(
        name=str(name_or_path),
        layers=_layers(info),
        hidden=info.config.hidden_size,
        intermediate=_intermediate(info),
        vocab=info.config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        layer_parameters=_passed(info),
        element_size=size,
        mixers=len(mixers),
        mixer_kv=sum(2 * g.num_kv_heads * g.head_dim * size for g in replaced),
        mixer_states=sum(m.state_bytes for m in mixers.values()),
        mixer_growth=growth,
        positions=positions(model),
        stretchable=can_stretch(model.config),
        in_order=not set(info.kinds) <= set(STATELESS),
    )


def _layers(info: ModelInfo) -> tuple[LayerShape, ...]:
    kinds, settings = layer_types(info.config.get_text_config(decoder=True))
    layers = []
    for index in info.attention:
        layer = info.layer_info(index)
        window = settings[index].get("sliding_window") if kinds[index] == SLIDING else None
        layers.append(LayerShape(layer.num_heads, layer.num_kv_heads, layer.head_dim, window))
    return tuple(layers)


def _chosen_experts(config: Any) -> tuple[int, int]:
    """(number of experts that a token passes, number of experts)."""
    total = next((n for key in _EXPERTS if (n := _number(config, key))), 0)
    return _number(config, "num_experts_per_tok") or total, total


def _number(config: Any, name: str) -> int:
    """A setting that is a number; the largest number where layers or kinds of experts have their own; 0 where
    it is not set."""
    found = [getattr(one, name, None) for one in layer_configs(config)]
    return max(max(x) if isinstance(x, list | tuple) else x or 0 for x in found)


def _passed(info: ModelInfo) -> int:
    """Parameters of the decoder's layers that one token passes: all but those of the experts that the router
    does not choose."""
    chosen, total = _chosen_experts(info.config)
    shared, experts = 0, 0
    for name, parameter in _layer_parameters(info.decoder):
        if ".experts." in name:
            experts += parameter.numel()
        else:
            shared += parameter.numel()
    return shared + (experts * chosen // total if total else experts)


def _layer_parameters(decoder: nn.Module) -> list[tuple[str, nn.Parameter]]:
    layers = next(m for m in (*decoder.children(), *decoder.modules()) if isinstance(m, nn.ModuleList))
    return list(layers.named_parameters())


def _intermediate(info: ModelInfo) -> int:
    chosen, total = _chosen_experts(info.config)
    width = _number(info.config, "moe_intermediate_size") if total else 0
    widths = (width, *(_number(info.config, name) for name in _MLP), 4 * info.config.hidden_size)
    return next(filter(None, widths)) * (chosen if total else 1)
