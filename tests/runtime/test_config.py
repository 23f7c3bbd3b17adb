"""The shape that a plan reads of a model's config, against the model itself: every one that patch serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from small_models import ARCHITECTURES, make, prompt

import farspan
from farspan.runtime.hf.config import read_shape

SMALL = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}
PLAIN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
OTHERS: dict[str, Any] = {  # beside those of small_models: configs with names of their own
    "gpt2": lambda: hf.GPT2Config(**SMALL, **GPT),
    "gpt2 with a width": lambda: hf.GPT2Config(**SMALL, **GPT, n_inner=80),
    "gptj": lambda: hf.GPTJConfig(**SMALL, **GPT, rotary_dim=8),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**SMALL, **GPT),
    "opt": lambda: hf.OPTConfig(
        **SMALL, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
        max_position_embeddings=256, word_embed_proj_dim=64,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SMALL, **PLAIN, max_position_embeddings=256),
    "phi": lambda: hf.PhiConfig(**SMALL, **PLAIN, max_position_embeddings=256),
    "starcoder2": lambda: hf.Starcoder2Config(**SMALL, **PLAIN, num_key_value_heads=2, sliding_window=None),
}  # fmt: skip
POSITIONS = {"gpt2": 256, "gpt2 with a width": 256, "gpt_bigcode": 256, "opt": 256, "phi": 256, "llama": 512}
STRETCHABLE = {"gpt2": False, "gpt_bigcode": False, "opt": False, "phi": True, "llama": True}
WIDTHS = {"gpt2": 256, "gpt2 with a width": 80, "gpt_bigcode": 256, "opt": 96, "phi": 96, "llama": 96}


def model_of(name: str) -> Any:
    if name in ARCHITECTURES:
        return make(name)
    return hf.AutoModelForCausalLM.from_config(OTHERS[name]()).eval()


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_the_shape_is_the_models_own(name: str, tmp_path: Path):
    model = model_of(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    try:
        farspan.patch(model, "dense").remove()
    except farspan.Unsupported as error:  # the oldest supported transformers has no attention interface in it
        assert name == "gptj"
        with pytest.raises(farspan.FarspanError, match="AttentionInterface"):
            read_shape(tmp_path, "float32")
        assert "AttentionInterface" in str(error)
        return
    found = read_shape(tmp_path, "float32")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        out = model(prompt(1, 5), use_cache=True, output_hidden_states=True)
    assert (found.hidden, found.vocab) == (out.hidden_states[-1].shape[-1], out.logits.shape[-1])
    keys = [layer.keys for layer in out.past_key_values.layers if getattr(layer, "keys", None) is not None]
    assert [(x.num_kv_heads, x.head_dim) for x in found.layers] == [(k.shape[1], k.shape[3]) for k in keys]
    if name in POSITIONS:
        assert (found.positions, found.intermediate) == (POSITIONS[name], WIDTHS[name])
    if name in STRETCHABLE:
        assert found.stretchable is STRETCHABLE[name]
