"""Which models `patch` accepts: a small copy of each class that is not tested by name is run first."""

from __future__ import annotations

import pytest
import test_wrapped
import torch
import transformers as hf
from small_models import (
    COMMON,
    UNTIED,
    VOCAB,
    WINDOW,
    close,
    decode,
    logits,
    padded,
    prompt,
    snapshot,
)
from test_wrapped import IMAGE, SPARSE, check

import farspan
from farspan.evals import memory
from farspan.runtime.hf import trial
from farspan.runtime.hf.config import _number
from farspan.runtime.hf.models import inspect_model

FULL = "quest:k=none,fraction=1.0,page=4,dense_layers=0"
SPECIAL = test_wrapped.SPECIAL


def build(kind, config, seed=0):
    torch.manual_seed(seed)
    return kind(config).eval()


def unpatchable(model, reason, spec="dense"):
    """``patch`` ends in Unsupported with that reason, in one sentence, and changes nothing."""
    before = snapshot(model)
    with pytest.raises(farspan.Unsupported, match=reason) as error:
        farspan.patch(model, spec)
    assert type(model).__name__ in str(error.value) and "\n" not in str(error.value)
    assert snapshot(model) == before
    return str(error.value)


# --- settings that are lists or words (f07) ---------------------------------------------------------------


def gemma4_text(**more):
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": WINDOW, "global_head_dim": 32}
    sizes |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB}
    return hf.Gemma4TextConfig(**{**COMMON, **UNTIED, **sizes, "num_kv_shared_layers": 0, **more})


@pytest.mark.parametrize("both_ways", [None, "vision"])
def test_f07_gemma4_without_shared_layers_is_served_exactly(both_ways):
    """Its kv_sharing_modes are a list, true though no layer reuses keys; "vision" leaves text causal."""
    model = build(hf.Gemma4ForCausalLM, gemma4_text(use_bidirectional_attention=both_ways))
    batch = padded((60, 41))
    expected, tokens = logits(model, batch), decode(model, batch)
    for spec in ("dense", FULL):
        with farspan.patch(model, spec):
            assert close(logits(model, batch), expected, batch["attention_mask"])
            assert torch.equal(decode(model, batch), tokens)
    check(model, batch)


def test_f07_gemma4_that_shares_keys_or_looks_both_ways_is_refused():
    shared = gemma4_text(num_kv_shared_layers=2)
    unpatchable(build(hf.Gemma4ForCausalLM, shared), "use another layer's keys")
    both = gemma4_text(use_bidirectional_attention="all")
    unpatchable(build(hf.Gemma4ForCausalLM, both), "its attention is bidirectional")


def test_f07_images_that_see_each_other_are_refused_and_text_beside_them_is_served():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16}
    config = hf.Gemma4Config(
        text_config=gemma4_text(use_bidirectional_attention="vision"),
        vision_config=vision,
        audio_config=None,
        image_token_id=IMAGE,
    )
    model, batch = build(hf.Gemma4ForConditionalGeneration, config), padded((60, 41))
    expected, tokens = logits(model, batch), decode(model, batch)
    kinds = torch.zeros_like(batch["input_ids"])
    kinds[:, 45:49] = 1  # four tokens of an image
    with farspan.patch(model):
        assert close(logits(model, batch), expected, batch["attention_mask"])
        assert torch.equal(decode(model, batch), tokens)
        for ask in (logits, decode):
            with pytest.raises(farspan.FarspanError, match=r"image tokens.*does not serve"):
                ask(model, {**batch, "mm_token_type_ids": kinds})


def test_f07_sizes_that_differ_from_layer_to_layer_are_counted_by_layer():
    model = build(hf.Gemma4ForCausalLM, gemma4_text())
    with torch.no_grad():
        output = model(prompt(1, 10), use_cache=True)
    layers = farspan.runtime.hf.returned_cache(output).layers
    held = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
    assert memory.kv_bytes(model, 10) == held
    assert memory.activation_bytes(model, 10) > 0


def test_f07_a_size_for_each_kind_of_expert_is_no_list_in_a_plan():
    for found, number in ((None, 0), (7, 7), ([48, 32], 48)):
        config = hf.PreTrainedConfig()
        config.width = found
        assert _number(config, "width") == number


# --- models whose source looks right (f08, f09) -----------------------------------------------------------


def minimax():
    kinds = ["linear_attention", "full_attention"]
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 2, "block_size": 16}
    return build(hf.MiniMaxForCausalLM, hf.MiniMaxConfig(**{**COMMON, **sizes, "layer_types": kinds}))


def doge():
    return build(hf.DogeForCausalLM, hf.DogeConfig(**{**COMMON, "num_hidden_layers": 2}))


TEXT = {"vocab_size": VOCAB, "embed_dim": 64, "layers": 2, "ffn_dim": 96, "attention_heads": 4}
TEXT |= {"max_position_embeddings": 512, "dropout": 0, "attention_dropout": 0, "activation_dropout": 0}


def kosmos2():
    sizes = {"text_config": TEXT, "vision_config": test_wrapped.VISION, "latent_query_num": 4}
    return build(hf.Kosmos2ForConditionalGeneration, hf.Kosmos2Config(**sizes))


def kosmos2_5():
    vision = {k: v for k, v in test_wrapped.VISION.items() if k not in ("image_size",)}
    vision |= {"head_dim": 16, "patch_embed_hidden_size": 12, "max_num_patches": 16}
    sizes = {"text_config": TEXT, "vision_config": vision, "latent_query_num": 4}
    return build(hf.Kosmos2_5ForConditionalGeneration, hf.Kosmos2_5Config(**sizes))


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (minimax, r"fails under farspan \(MiniMax uses cache of its own"),
        (doge, "a small copy of it fails under farspan"),
        (kosmos2, r"fails under farspan \(.*4-D"),
    ],
)
def test_f08_what_cannot_run_is_refused_at_patch(make_model, reason):
    model = make_model()
    for spec in ("dense", SPARSE):
        unpatchable(model, reason, spec)


def test_f08_attention_outside_of_the_decoder_keeps_the_config_it_has():
    """Kosmos-2.5 attends over the image under the text's config; that attention is not farspan's."""
    model, text = kosmos2_5(), prompt(1, 20)
    patches = torch.randn(1, 4, 14, generator=torch.Generator().manual_seed(0))
    patches[0, :, :2] = torch.tensor([[1, 1], [1, 2], [2, 1], [2, 2]])
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), "flattened_patches": patches}
    inputs |= {"width": torch.tensor([2]), "height": torch.tensor([2])}
    inputs["image_embeds_position_mask"] = torch.tensor([[0, 1, 1, 1, 1] + [0] * 15])
    other = {**inputs, "flattened_patches": patches.flip(2)}
    assert not torch.equal(logits(model, inputs), logits(model, other))
    check(model, inputs)


def test_f09_a_decoder_that_is_none_is_refused():
    """ModernBertDecoder calls its head `decoder`, and get_decoder() gives that."""
    special = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = hf.ModernBertDecoderConfig(**sizes, num_attention_heads=4, **special)
    unpatchable(build(hf.ModernBertDecoderForCausalLM, config), r"get_decoder\(\) returns a Linear")


def test_f09_a_config_with_settings_of_single_layers_is_read_layer_by_layer():
    """Such a config raises where it is asked for them as a whole (dots3_note's kv_lora_rank)."""
    config = hf.LlamaConfig(**COMMON)
    config.kv_lora_rank = None
    config.per_layer_config = {1: {"kv_lora_rank": 8}}
    assert config.is_heterogeneous
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        _ = config.kv_lora_rank
    unpatchable(build(hf.LlamaForCausalLM, config), "latent attention")


@pytest.mark.slow
def test_f09_every_causal_lm_of_transformers_is_accepted_or_refused():
    """Built from its default config without weights: no other error, and only the known ones fail a trial."""
    listed = hf.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    names = [name for given in listed for name in ([given] if isinstance(given, str) else given)]
    accepted, failed = set(), set()
    for name in sorted(set(names)):
        kind = getattr(hf, name)
        try:
            with torch.device("meta"):
                model = kind(kind.config_class())
        except Exception:  # its config has no defaults of its own, or it needs another library
            continue
        try:
            info = inspect_model(model)
            assert info.geometry and all(info.layer_info(i).head_dim > 0 for i in info.attention)
        except farspan.Unsupported:
            continue
        found = trial.try_out(info)
        (failed if found is not None and found.reasons else accepted).add(name)
    # Before 5.22 RecurrentGemma's cache counts the tokens of its first layer, which caches none.
    assert failed - {"RecurrentGemmaForCausalLM"} == {"DogeForCausalLM", "MiniMaxForCausalLM"}
    assert len(accepted) > 50


# --- keys that are not the cache's own (f17) --------------------------------------------------------------


def test_f17_a_decode_method_that_could_never_run_is_refused_at_patch():
    """JetMoe repeats the keys behind its cache, so every call is a prefill."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 16}
    sizes |= {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = build(hf.JetMoeForCausalLM, hf.JetMoeConfig(**SPECIAL, **sizes))
    for spec in (SPARSE, f"block_topk:k=16,block=8 + {SPARSE}", "recycled:k=16"):
        unpatchable(model, r"at decode on JetMoe.*not those of the cache.*prefill method or dense", spec)
    unpatchable(model, "at decode", farspan.parse_method(SPARSE))
    batch = padded((60, 41))
    tokens = decode(model, batch)
    with farspan.patch(model, "dense") as patched:
        assert torch.equal(decode(model, batch), tokens)
    with farspan.patch(model, "block_topk:k=16,block=8") as patched:
        decode(model, batch)
    summary = patched.report().summary
    assert summary["prefill_density"] < 1 and summary["decode_density"] is None
