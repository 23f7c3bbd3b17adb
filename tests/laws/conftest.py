"""Fixtures of the laws: a tiny model in float64, the recipes that methods need, methods bound to a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.method import AttentionMethod

from .tools import layer_info


@pytest.fixture(autouse=True)
def _poisoned_empty_buffers() -> Iterator[None]:
    """torch.empty is full of NaN, so that whoever reads what nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def model(tiny_llama: Callable[..., Any]) -> Any:
    """A random Llama in float64 (norms in float32), its weights so large that attention is peaked."""
    return tiny_llama(initializer_range=0.15).double()


def _tokenizer(text: str, **how: Any) -> dict[str, torch.Tensor]:
    """Characters as tokens; what ``calibrate`` asks of a tokenizer."""
    return {"input_ids": torch.tensor([[3 + ord(c) % 120 for c in text[: how["max_length"]]]])}


@pytest.fixture(scope="session")
def recipe(model: Any) -> Callable[[AttentionMethod], Any]:
    """The recipe that a method needs, calibrated on the tiny model; None for methods that need none."""
    made: dict[str, Any] = {}

    def get(method: AttentionMethod) -> Any:
        if not method.needs_recipe:
            return None
        if method.name not in made:
            text = "".join(chr(33 + (7 * i * i + i // 3) % 90) for i in range(300))
            made[method.name] = farspan.calibrate(model, _tokenizer, text, method=method.name, tokens=256)
        return made[method.name]

    return get


@pytest.fixture
def bound(method: AttentionMethod, recipe: Callable[[AttentionMethod], Any]) -> AttentionMethod:
    """``method`` as the layer of the attention-level tests runs it."""
    made, info = recipe(method), layer_info()
    if made is not None:
        info = made.for_layer(method.name, info, made.geometry)
    served = method.for_layer(info)
    assert served is not None, "the laws are about layers that a method serves: set dense_layers to 0"
    return served


@pytest.fixture
def patched(model: Any, recipe: Callable[[AttentionMethod], Any]) -> Callable[..., Any]:
    """patch(model, method) with the recipe it needs."""
    return lambda method, **how: farspan.patch(model, method, recipe=recipe(method), **how)
