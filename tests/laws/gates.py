"""Recipes of random weights for methods that are trained."""

from __future__ import annotations

from typing import Any

import torch

from farspan.attention.method import AttentionMethod
from farspan.runtime import hf
from farspan.runtime.recipe import Recipe


def random_gates(method: AttentionMethod, model: Any) -> Recipe:
    """A recipe for a method that is trained: the modules that its training begins with, every parameter
    replaced by random numbers of the scale of a projection's."""
    info = hf.inspect_model(model)
    trained = {i: method.for_training(info.layer_info(i)) for i in info.attention}
    modules = {i: served.module for i, served in trained.items() if served is not None}
    generator = torch.Generator().manual_seed(0)
    for module in modules.values():
        for p in module.parameters():
            fan_in = p.shape[-2] if p.dim() > 1 else 1
            p.data = torch.randn(p.shape, generator=generator) * fan_in**-0.5
    return Recipe.of_modules(method, modules, info.geometry, {})
