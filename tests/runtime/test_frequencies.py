"""Gates are fed the frequencies of a layer's own RoPE: those of the model's rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import make, prompt
from torch import Tensor

import farspan
from farspan.attention.needs import Inputs, Needs
from farspan.runtime import hf

NEEDS = Needs(queries_before_rope=True)


def fed(model: Any, index: int) -> Inputs:
    """What layer ``index`` is fed in one call."""
    seen: list[Inputs] = []
    info = hf.inspect_model(model)
    with farspan.patch(model, "dense"), torch.no_grad():
        stop = hf.observe(info, index, NEEDS, lambda q, k, v, softmax, *, inputs: seen.append(inputs))
        model(prompt(), use_cache=False)
        stop()
    return seen[0]


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": YARN}),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3", {"dtype": "bfloat16"}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("gemma3", {}),
    ("gpt_oss", {}),
    ("qwen3_next", {}),
]


@pytest.mark.parametrize("name, settings", MODELS, ids=str)
def test_they_are_those_of_the_rotary_embedding(name: str, settings: dict[str, Any]) -> None:
    model = make(name, **{k: v for k, v in settings.items() if k != "dtype"})
    model = model.to(getattr(torch, settings.get("dtype", "float32")))
    buffers = dict(model.model.rotary_emb.named_buffers())
    own: Tensor = buffers.get("full_attention_inv_freq", buffers.get("inv_freq"))
    index = max(hf.inspect_model(model).attention)  # a layer of full attention
    found = fed(model, index).frequencies
    assert found is not None and found.dtype == torch.float32
    assert found.shape == own.shape
    assert torch.allclose(found, own.float(), rtol=1e-5)


def test_a_layer_without_rope_has_none() -> None:
    from small_models import COMMON
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    settings = {k: v for k, v in COMMON.items() if k != "head_dim"}
    torch.manual_seed(0)
    model = SmolLM3ForCausalLM(SmolLM3Config(**settings, no_rope_layers=[1, 1, 0])).eval()
    assert fed(model, 2).frequencies is None
    assert fed(model, 1).frequencies is not None
