"""Which models `patch` accepts: a small copy of each class that is not tested by name is run first."""

from __future__ import annotations

import re
import warnings

import pytest
import small_models
import test_wrapped
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from small_models import (
    COMMON,
    UNTIED,
    VOCAB,
    WINDOW,
    close,
    decode,
    logits,
    make,
    padded,
    prompt,
    snapshot,
)
from test_wrapped import IMAGE, SPARSE, check, seeded
from transformers.models.llama import modeling_llama

import farspan
from farspan.evals import memory
from farspan.runtime.hf import releases, tiny, trial
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


# --- layers that do not continue exactly (f12) ------------------------------------------------------------


def bamba():
    sizes = {k: v for k, v in COMMON.items() if k != "head_dim"} | {"attn_layer_indices": [1]}
    sizes |= {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
    return build(hf.BambaForCausalLM, hf.BambaConfig(**sizes))


def jamba():
    sizes = {k: v for k, v in COMMON.items() if k != "head_dim"} | {"num_hidden_layers": 4}
    sizes |= {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
    sizes |= {"expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
    sizes |= {"use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4}
    return build(hf.JambaForCausalLM, hf.JambaConfig(**sizes))


def calls_of(decoder):
    """Fills with the numbers of tokens in the calls that the decoder's first layer sees."""
    lengths = []

    def see(_, args, kwargs):
        lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    layers = next(m for m in decoder.children() if isinstance(m, torch.nn.ModuleList))
    layers[0].register_forward_pre_hook(see, with_kwargs=True)
    return lengths


@pytest.mark.parametrize("make_model", [bamba, jamba])
def test_f12_a_prompt_is_not_cut_where_layers_do_not_continue_exactly(make_model):
    model, batch = make_model(), padded((60, 41))
    expected, lengths = logits(model, batch), calls_of(model.get_decoder())
    assert not trial.continues_exactly(inspect_model(model))
    with pytest.warns(UserWarning, match="prefill_chunk is not used") as warned:
        patched = farspan.patch(model, "dense", prefill_chunk=20)
    assert type(model).__name__ in str(warned[0].message) and warned[0].filename == __file__
    with patched:
        assert close(logits(model, batch), expected, batch["attention_mask"])
    assert lengths == [60]


def test_f12_recurrent_gemma_gives_back_no_cache_and_does_not_continue_exactly():
    config = hf.RecurrentGemmaConfig(**{**COMMON, "lru_width": 64, "attention_window_size": WINDOW})
    assert not trial.continues_exactly(inspect_model(build(hf.RecurrentGemmaForCausalLM, config)))


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_next"])
def test_f12_a_prompt_is_cut_where_layers_continue_exactly(name):
    model, batch = make(name), padded((60, 41))
    lengths = calls_of(model.get_decoder())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with farspan.patch(model, "dense", prefill_chunk=20):
            logits(model, batch)
    assert lengths == [20, 20, 20]


def test_f12_attention_continues_exactly_without_a_trial(monkeypatch):
    monkeypatch.setattr(trial, "small_copies", None)
    for name in ("llama", "gemma3"):
        assert trial.continues_exactly(inspect_model(make(name)))


# --- the trial --------------------------------------------------------------------------------------------


def granite(**more):
    return build(hf.GraniteForCausalLM, hf.GraniteConfig(**{**COMMON, **UNTIED, **more}))


def test_the_tested_classes_are_those_that_the_tests_build():
    built = [make(name) for name in small_models.ARCHITECTURES]
    built += [seeded(build) for build in (test_wrapped.llava, test_wrapped.qwen2_vl, test_wrapped.gemma3)]
    built += [seeded(build) for build in (test_wrapped.gpt2, test_wrapped.neox, test_wrapped.opt)]
    assert {type(model).__name__ for model in built} == releases.ARCHITECTURES
    assert all(releases.is_tested(type(model)) for model in built)


@pytest.mark.parametrize("name", sorted(releases.ARCHITECTURES - {"Qwen2VLForConditionalGeneration"}))
def test_every_tested_class_has_a_small_copy_at_its_real_size(name):
    """Else an untested release would be taken unseen. (Qwen2-VL's default config has no sections of RoPE.)"""
    kind = getattr(hf, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    assert trial.try_out(inspect_model(model)) == trial.Trial()


def test_a_copy_of_a_real_vision_language_model_has_narrow_heads():
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "rope_parameters": rope}
    with torch.device("meta"):
        model = hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text))
    info = inspect_model(model)
    small = next(tiny.small_copies(info))
    assert small.config.hidden_size == 14 * 16 and small.config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert trial.try_out(info) == trial.Trial()


def test_a_trial_leaves_nothing_behind():
    model = granite()
    before, filters = snapshot(model), list(warnings.filters)

    def settings():
        dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
        return torch.get_rng_state().tolist(), dtype, grad, hf.logging.get_verbosity()

    torch.set_default_dtype(torch.bfloat16)
    try:
        were = settings()
        with farspan.patch(model):
            assert settings() == were
            assert warnings.filters == filters
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert trial._try_out(inspect_model(model)) == trial.Trial()
        assert settings() == were
    finally:
        torch.set_default_dtype(torch.float32)
    assert snapshot(model) == before


def test_a_trial_is_made_once_for_a_class_and_a_config(monkeypatch):
    monkeypatch.setattr(trial, "_done", {})
    made, copies = [], trial.small_copies
    monkeypatch.setattr(trial, "small_copies", lambda info: made.append(info) or copies(info))
    for _ in range(2):
        farspan.patch(granite()).remove()
    assert len(made) == 1
    farspan.patch(granite(num_hidden_layers=2)).remove()
    assert len(made) == 2
    farspan.patch(make("llama")).remove()  # its class is tested
    assert len(made) == 2


def test_what_wraps_an_untested_class_does_not_hide_it():
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    check(get_peft_model(granite(), lora).eval())
    model = granite().to(torch.bfloat16)
    with farspan.patch(model):
        decode(model, padded())


class Odd(hf.LlamaForCausalLM):
    """A user's own class, which cannot be made from a config alone."""

    def __init__(self, config, extra):
        super().__init__(config)
        self.extra = extra


def test_a_class_of_which_no_copy_can_be_made_is_taken_as_it_is(monkeypatch):
    torch.manual_seed(0)
    model = Odd(hf.LlamaConfig(**COMMON), extra=1).eval()
    assert not releases.is_tested(Odd)
    assert trial.try_out(inspect_model(model)) is None
    check(model)
    monkeypatch.setattr(releases, "TESTED", ("5.20",))
    with pytest.warns(
        UserWarning, match=r"any tested \(up to 5\.20\), and no small copy of Odd could be run"
    ):
        farspan.patch(model).remove()


# --- the canary: releases newer than any tested -----------------------------------------------------------


@pytest.fixture
def untested(monkeypatch):
    """The installed transformers, as if the tests had never run on it."""
    monkeypatch.setattr(releases, "TESTED", ("5.19", "5.20"))
    monkeypatch.setattr(trial, "_done", {})


def test_a_new_release_that_breaks_nothing_is_taken_in_silence(untested):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        farspan.patch(make("llama")).remove()


def breaks(monkeypatch, name, change):
    monkeypatch.setattr(modeling_llama, name, change(getattr(modeling_llama, name)))


def mask_is_lost(original):
    """Masks are handed only to the attention that transformers knows."""

    def create(*args, **kwargs):
        mask = original(*args, **kwargs)
        return None if mask is None or mask.dim() == 2 else mask

    return create


def interface_is_renamed(original):
    class Interface:
        def get_interface(self, name, default):
            if name == "farspan":
                raise TypeError("attention functions take one argument more")
            return original.get_interface(name, default)

    return Interface()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("create_causal_mask", mask_is_lost, r"computes other logits under farspan \(a difference of \d+%\)"),
        ("ALL_ATTENTION_FUNCTIONS", interface_is_renamed, r"fails under farspan \(attention functions take"),
    ],
)
def test_a_new_release_that_breaks_farspan_is_refused_in_one_sentence(
    untested, monkeypatch, name, change, says
):
    model = make("llama")
    breaks(monkeypatch, name, change)
    text = unpatchable(model, says)
    assert f"transformers {releases.installed()} is newer than any tested (up to 5.20)" in text
    assert re.search(r"install 'transformers>=5\.19,<5\.21'\.$", text)
