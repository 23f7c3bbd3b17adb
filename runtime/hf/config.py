"""A model by its config alone, without its weights: for planning, and for trying its class out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ...parallel.planner.job import LayerShape, ModelShape
from ..models import errors_as_sentences, positions, quiet, resolve
from ..rope import can_stretch
from .models import SLIDING, ModelInfo, inspect_model, layer_configs
from .transformers_private import layer_types

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MLP = ("intermediate_size", "ffn_dim", "n_inner")


def empty_model(name_or_path: str | Path) -> Any:
    """The model of an alias, a local folder or a hub id, by its config and without weights (torch's meta
    device); of a hub id only config.json is fetched. Raises FarspanError where it cannot be found or read."""
    target = resolve(name_or_path)
    with errors_as_sentences(str(name_or_path), target), quiet():
        config = AutoConfig.from_pretrained(target)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def empty_llama() -> Any:
    """A Llama without weights, of any size."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=128))


def read_shape(name_or_path: str | Path, dtype: str = "auto") -> ModelShape:
    """The shape of an alias, a local folder's or a hub id's model; parameters are counted, not guessed.

    dtype: "auto" (as the config says, else bfloat16) or a torch dtype's name. Raises FarspanError where it
    cannot be found or read, and Unsupported where farspan cannot serve it.
    """
    model = empty_model(name_or_path)
    info = inspect_model(model)
    saved = getattr(model.config, "dtype", None) or getattr(info.config, "dtype", None) or torch.bfloat16
    chosen = saved if dtype == "auto" else getattr(torch, dtype)
    size = (getattr(torch, chosen) if isinstance(chosen, str) else chosen).itemsize
    return ModelShape(
        name=str(name_or_path),
        layers=_layers(info),
        hidden=info.config.hidden_size,
        intermediate=_intermediate(info),
        vocab=info.config.vocab_size,
        parameters=sum(p.numel() for p in model.parameters()),
        layer_parameters=_passed(info),
        element_size=size,
        positions=positions(model),
        stretchable=can_stretch(model.config),
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
    """(experts that a token passes, experts there are)."""
    total = next((n for key in _EXPERTS if (n := _number(config, key))), 0)
    return _number(config, "num_experts_per_tok") or total, total


def _number(config: Any, name: str) -> int:
    """A setting that is a number; the largest, where it is given for each layer or kind of expert; else 0."""
    found = [getattr(one, name, None) for one in layer_configs(config)]
    return max(max(x) if isinstance(x, list | tuple) else x or 0 for x in found)


def _passed(info: ModelInfo) -> int:
    """Parameters of the decoder's layers that one token passes: everything but the experts it is not sent
    to."""
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
