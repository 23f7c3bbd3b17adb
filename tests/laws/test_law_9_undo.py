"""Law 9: after remove() the model is bit for bit what it was, config and hooks included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM

import farspan
from farspan.attention.method import AttentionMethod

from .parameters import every_method

IDS = torch.randint(3, 128, (1, 60), generator=torch.Generator().manual_seed(0))
PLAIN = (int, float, str, bool)
HOW: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def _hooks(value: Any) -> Any:
    return {k: id(v) for k, v in value.items()} if hasattr(value, "items") else value


def snapshot(model: Any) -> dict[str, Any]:
    """Everything a patch could leave behind, module by module."""
    state: dict[str, Any] = {"class": type(model)}
    for name, module in model.named_modules():
        inside = vars(module)
        state[name] = {
            "class": type(module),
            "names": list(inside),
            "values": {k: v if isinstance(v, PLAIN) else id(v) for k, v in inside.items()},
            "hooks": {k: _hooks(v) for k, v in inside.items() if "hook" in k},
            "config": copy.deepcopy(vars(inside["config"])) if "config" in inside else None,
        }
    return state


@pytest.fixture(scope="module")
def unpatched(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and tokens of the model before any patch."""
    with torch.no_grad():
        return model(IDS).logits, model.generate(IDS, **HOW)


@every_method()
@pytest.mark.parametrize("how", [{}, {"prefill_chunk": 32}, {"layers": {0: "dense"}}], ids=str)
def test_everything_is_as_it_was(
    model: Any,
    patched: Callable[..., Any],
    unpatched: tuple[torch.Tensor, torch.Tensor],
    method: AttentionMethod,
    how: dict[str, Any],
) -> None:
    logits, tokens = unpatched
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    generation = model.generation_config.to_dict()
    before = snapshot(model)
    assert before == snapshot(model), "the test can tell equal from unequal"

    patch = patched(method, **how)
    try:
        assert snapshot(model) != before
        model.generate(IDS, **HOW)
        with torch.no_grad():
            model(IDS)
    finally:
        patch.remove()

    after = snapshot(model)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name] == before[name], name or "the model itself"
    assert model.generation_config.to_dict() == generation
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[name], x) for name, x in weights.items())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    assert torch.equal(model.generate(IDS, **HOW), tokens)


@every_method()
def test_an_error_inside_undoes_the_patch(
    model: Any, patched: Callable[..., Any], method: AttentionMethod
) -> None:
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"), patched(method):
        model.generate(IDS, **HOW)
        raise RuntimeError("on purpose")
    assert snapshot(model) == before
    with patched(method), pytest.raises(farspan.FarspanError):
        model(IDS, output_attentions=True)
    assert snapshot(model) == before


@every_method()
def test_other_models_are_left_alone(
    model: Any, patched: Callable[..., Any], method: AttentionMethod
) -> None:
    """A second model built from the very same config object, while the first is patched and after."""
    torch.manual_seed(1)
    other = LlamaForCausalLM(model.config).eval()
    assert other.config is model.config
    before, implementation = snapshot(other), other.config._attn_implementation
    with torch.no_grad():
        want = other(IDS).logits
    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    known = [dict(r) for r in registries]
    with patched(method):
        assert other.config._attn_implementation == implementation
        assert snapshot(other) == before
        with torch.no_grad():
            assert torch.equal(other(IDS).logits, want)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, want)
    for registry, old in zip(registries, known, strict=True):
        assert {**registry, "farspan": None} == {**old, "farspan": None}
