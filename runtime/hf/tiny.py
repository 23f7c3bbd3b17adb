"""Small copies of a model: the same class and kinds of layers, but few, narrow layers and random weights."""

from __future__ import annotations

import copy
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .models import ModelInfo, without_head
from .transformers_private import reset_attention

VOCAB = 128
TOKENS = range(3, 64)  # the tokens of calls; no special token is among them
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HEAD_DIM, _KV_HEADS, _GROUP = 16, 2, 8  # the largest values in a copy
_LARGEST = 20_000_000  # parameters; a larger copy takes too long to make and to run


@dataclass(frozen=True)
class _Scale:
    """The factors by which sizes that depend on each other are multiplied."""

    width: Fraction = Fraction(1)
    heads: Fraction = Fraction(1)
    head_dim: Fraction = Fraction(1)


def _times(field: str) -> Callable[[int, _Scale], int]:
    return lambda n, scale: n if n <= 0 else max(1, round(n * getattr(scale, field)))


def _most(limit: int) -> Callable[[int, _Scale], int]:
    return lambda n, _: min(n, limit)


# (pattern of the whole name of a setting, its change). The first pattern that fits applies.
_RULES: tuple[tuple[str, Callable[[int, _Scale], int]], ...] = (
    (r".*vocab_size.*", _most(VOCAB)),
    (r".*token_(id|index)", _most(VOCAB - 1)),
    (r".*intermediate_size.*|(ffn|dff|n_inner|.*expert_dim|router_hidden_size)(_dim)?", _most(64)),
    (r".*experts_per_tok.*|moe_topk|moe_k|top_k_experts", _most(2)),
    (r"(?!.*shared).*(num|n)_.*experts", _most(4)),
    (r"(.*_)?n_groups?|topk_group", _most(1)),
    (r".*window(_size)?|(.*_)?chunk_size|block_size", _most(16)),
    (r"(linear|gdn)_.*_head_dim|ssm_state_size|mamba_d_state|hidden_size_per_layer_input", _most(16)),
    (r"linear_num_key_heads", _most(2)),
    (r"hidden_size|lru_width|word_embed_proj_dim|moe_hidden_size", _times("width")),
    (r"mamba_(d_ssm|n_heads|num_heads|dt_rank)", _times("width")),
    (r"(?!mamba)((.*_)?head_dim|kv_channels|rotary_dim)", _times("head_dim")),
    (r"mrope_section", _times("head_dim")),
    (r"num_attention_heads.*|num_.*(key_value|attention)_heads|index_n_heads", _times("heads")),
)


def small_copies(info: ModelInfo) -> Iterator[PreTrainedModel]:
    """Yield small models of the class of ``info.model``, on the CPU in float32; nothing where none can be
    made. The one that is more likely to run comes first.

    Only the class and the config are used, not the weights, so the model may be on any device. For a
    multimodal model, the copies are of the class of the decoder.
    """
    original = owner(info)
    if original.config.get_text_config(decoder=True) is not original.config:
        original = info.decoder
    for head_dim in (_HEAD_DIM, sys.maxsize):
        try:
            config, kind = shrink(original.config, _layers(info), head_dim), own_class(original)
            with torch.device("meta"):
                size = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
            if size <= _LARGEST:
                yield kind(config).float().eval()
        except Exception:  # a class of any author may raise anything at such small sizes
            continue


def owner(info: ModelInfo) -> Any:
    """The transformers model that contains the decoder, without the wrappers of peft or others."""
    around = (m for m in info.model.modules() if isinstance(m, PreTrainedModel))
    return next((m for m in around if without_head(m.get_decoder()) is info.decoder), info.decoder)


def own_class(module: Any) -> type[Any]:
    """The class of a module as its author wrote it. fully_shard (FSDP) makes a subclass of it."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, sharded))


def _layers(info: ModelInfo) -> int:
    """The smallest number of first layers that include every kind of layer, so that kinds that alternate by
    layer number still do so."""
    kinds = [(kind, type(info.attention.get(i))) for i, kind in enumerate(info.kinds)]
    return max(2, *(kinds.index(kind) + 1 for kind in kinds)) if len(kinds) > 1 else 1


def shrink(config: Any, layers: int, head_dim: int) -> Any:
    """A copy of a config with small sizes, and with the first ``layers`` layers of the original."""
    small = copy.deepcopy(config)
    overrides: dict[Any, Any] = {}
    if getattr(small, "is_heterogeneous", False):
        overrides, small.per_layer_config = small.to_dict()["per_layer_config"], None
    scale, total = _scale(small, head_dim), small.num_hidden_layers
    names = {stored: name for name, stored in type(config).attribute_map.items()}
    values = vars(small)
    for stored, value in list(values.items()):
        name = names.get(stored, stored)
        if isinstance(value, list | tuple) and len(value) == total:
            value = value[:layers]
        values[stored] = _smaller(name, value, scale)
    small.num_hidden_layers = layers
    for name, token in _SPECIAL.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, token)
    if getattr(small, "initializer_range", None):
        small.initializer_range = 0.2  # large, so that attention is not nearly uniform and faults show
    kept = {int(i): own for i, own in overrides.items() if int(i) < layers}
    if kept:
        small.per_layer_config = {i: _smaller("", own, scale) for i, own in kept.items()}
    reset_attention(small)
    return small


def _scale(config: Any, most: int) -> _Scale:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    few = min(kv_heads, _KV_HEADS) * min(heads // kv_heads, _GROUP)
    narrow = min(head_dim, most)
    return _Scale(
        min(Fraction(few * narrow, width), Fraction(1)), Fraction(few, heads), Fraction(narrow, head_dim)
    )


def _smaller(name: str, value: Any, scale: _Scale) -> Any:
    if isinstance(value, dict):
        return {key: _smaller(str(key), inner, scale) for key, inner in value.items()}
    if name in ("short_factor", "long_factor"):  # lists of RoPE, one number for each pair of channels
        return value[: int(len(value) * scale.head_dim)]
    if isinstance(value, list | tuple):
        return type(value)(_smaller(name, inner, scale) for inner in value)
    if type(value) is not int:
        return value
    return next((rule(value, scale) for pattern, rule in _RULES if re.fullmatch(pattern, name)), value)


@contextmanager
def alone() -> Iterator[None]:
    """A context after which the random state, warnings and settings are what they were before."""
    level, dtype = transformers_logging.get_verbosity(), torch.get_default_dtype()
    with (
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity(logging.CRITICAL)
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            transformers_logging.set_verbosity(level)
