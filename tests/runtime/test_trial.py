"""The trial of a small copy, before an untested class or a new release of transformers is taken."""

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
    WINDOW,
    Feed,
    close,
    decode,
    logits,
    make,
    padded,
    snapshot,
)
from test_accepted import build, unpatchable
from test_wrapped import check, seeded
from transformers.models.llama import modeling_llama

import farspan
from farspan.runtime.hf import releases, tiny, trial
from farspan.runtime.hf.models import inspect_model

# --- layers that do not continue exactly (f12) ------------------------------------------------------------


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


def test_f12_a_prompt_is_not_cut_where_layers_do_not_continue_exactly():
    model, batch = jamba(), padded((60, 41))
    expected, lengths = logits(model, batch), calls_of(model.get_decoder())
    assert not trial.continues_exactly(inspect_model(model))
    with pytest.warns(UserWarning, match="prefill_chunk is not used") as warned:
        patched = farspan.patch(model, "dense", prefill_chunk=20)
    assert type(model).__name__ in str(warned[0].message) and warned[0].filename == __file__
    with patched:
        assert close(logits(model, batch), expected, batch["attention_mask"])
        assert lengths == [60]
        feed = Feed(model, batch["input_ids"], batch["attention_mask"])
        feed(40)
        feed(1)
        with pytest.raises(farspan.FarspanError, match="JambaForCausalLM without attention forget their"):
            feed(19)


def test_f12_recurrent_gemma_gives_back_no_cache_and_does_not_continue_exactly():
    config = hf.RecurrentGemmaConfig(**{**COMMON, "lru_width": 64, "attention_window_size": WINDOW})
    assert not trial.continues_exactly(inspect_model(build(hf.RecurrentGemmaForCausalLM, config)))


@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_next", "bamba"])
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


# What a default config needs so that the model has attention.
NEEDED = {
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    }
}


@pytest.mark.parametrize("name", sorted(releases.ARCHITECTURES - {"Qwen2VLForConditionalGeneration"}))
def test_every_tested_class_has_a_small_copy_at_its_real_size(name):
    """Else an untested release would be taken unseen. (Qwen2-VL's default config has no sections of RoPE.)"""
    kind = getattr(hf, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**NEEDED.get(name, {})))
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
