"""Copies of a model's configs that name farspan's attention while the model is patched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .interface import NAME
from .transformers_private import ATTENTION, attention_of, set_attention


def copy_configs(
    model: nn.Module, text: PreTrainedConfig, leave: Callable[[nn.Module], bool]
) -> Callable[[], None]:
    """Copy the config ``text`` and each config that contains it, name farspan's attention in the copies, and
    set the copies in the modules of ``model`` that hold the originals. Returns the undo step.

    leave: whether a module keeps its config, such as attention over an image (Kosmos-2.5).

    Two models that were built from one config object share it. Without a copy, the other model would use
    farspan's attention too. The copies are shallow: lists and the config of a vision model in them are the
    originals. The undo step restores the originals and repeats on them every change that was made on the
    copies, including another attention implementation. If another model shares an original, these changes
    then apply to it too.
    """
    copies: dict[int, tuple[Any, Any]] = {}  # by id of the original: (original, copy)

    def copied(config: PreTrainedConfig) -> Any:
        if id(config) not in copies:
            new = copy.copy(config)
            copies[id(config)] = config, new
            for name, value in vars(new).items():
                if _leads_to(value, text):  # transformers makes masks by the config that contains ``text``
                    vars(new)[name] = copied(value)
        return copies[id(config)][1]

    others = []
    for module in model.modules():
        config = vars(module).get("config")
        if not _leads_to(config, text):
            others.append((config, attention_of(config)))
        elif not leave(module):
            module.config = copied(config)
    set_attention(copied(text), NAME)
    before = {key: dict(vars(new)) for key, (_, new) in copies.items()}

    def undo() -> None:
        originals = {id(new): config for config, new in copies.values()}
        for config, name in others:
            if attention_of(config) == NAME:  # set_attn_implementation reaches every part of a model
                set_attention(config, name)
        for key, (config, new) in copies.items():
            own, now, was = vars(config), vars(new), before[key]
            for name in [name for name in was if name not in now]:
                own.pop(name, None)
            for name, value in now.items():
                if (name not in was or value is not was[name]) and (name, value) != (ATTENTION, NAME):
                    own[name] = originals.get(id(value), value)
        for module in model.modules():
            config = vars(module).get("config")
            if id(config) in originals:
                module.config = originals[id(config)]

    return undo


def _leads_to(config: Any, text: PreTrainedConfig) -> bool:
    return config is text or (
        isinstance(config, PreTrainedConfig) and config.get_text_config(decoder=True) is text
    )
