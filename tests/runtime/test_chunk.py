"""Chunked prefill: a prompt in chunks gives what the unpatched model gives for the whole of it, or stays
whole."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import transformers as hf
from small_models import COMMON, UNTIED, close, decode, logits, make, padded, prompt
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.kosmos2_5.configuration_kosmos2_5 import Kosmos2_5TextConfig
from transformers.models.kosmos2_5.modeling_kosmos2_5 import Kosmos2_5TextForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import farspan
from farspan.attention.errors import FarspanError
from farspan.runtime.hf import returned_cache, with_cache
from farspan.runtime.hf.chunked_prefill import _joined
from farspan.runtime.hf.decoder_over_ranks import foreign_tensors

CHUNK = 24


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


# --- f01: RoPE whose frequencies depend on the length of the call -------------------------------------------

SHORT = 64  # positions below which longrope takes its short factors, and dynamic NTK stretches nothing
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": SHORT,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


def gemma3(rope):
    kinds = {"full_attention": rope, "sliding_attention": DEFAULT}
    return make("gemma3", rope_parameters=kinds, max_position_embeddings=SHORT)


def phimoe():
    rope = LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.3}
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": rope, **UNTIED}
    config = hf.PhimoeConfig(**COMMON, **more)
    config.original_max_position_embeddings = SHORT
    return hf.PhimoeForCausalLM(config)


def qwen2_vl():
    """Its rotary embedding takes three axes of positions; its decoder may be given a fourth, the text's."""
    rope = {**DYNAMIC, "mrope_section": [2, 3, 3]}
    text = {**COMMON, "max_position_embeddings": SHORT, "rope_parameters": rope}
    vision = {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_size": 64}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = {name: 100 + i for i, name in enumerate(names)}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    )


BY_LENGTH = {
    "phi3 longrope": lambda: make("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=SHORT),
    "llama longrope": lambda: make("llama", rope_parameters=LONGROPE, **UNTIED),
    "llama dynamic": lambda: make("llama", rope_parameters=DYNAMIC, max_position_embeddings=SHORT, **UNTIED),
    "gemma3 longrope": lambda: gemma3(LONGROPE),
    "gemma3 dynamic": lambda: gemma3(DYNAMIC),
    "phimoe longrope": phimoe,
    "qwen2_vl dynamic": qwen2_vl,
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_f01_frequencies_are_those_of_the_whole_call(name):
    """Below and above the boundary, in a padded batch, and as a second call on a cache."""
    ids, more, batch = prompt(1, 100), prompt(1, 90, seed=1), padded((100, 61))
    assert ids.shape[1] > SHORT > 58

    def run(patch):
        model = seeded(BY_LENGTH[name])  # anew: dynamic NTK remembers the longest call
        with patch(model), torch.no_grad():
            found = [logits(model, ids[:, :58]), logits(model, ids), logits(model, batch)[1:, -61:]]
            first = model(ids[:, :58])
            found.append(model(more, **with_cache(model, returned_cache(first))).logits)
        assert not any("forward" in vars(module) for module in model.modules())
        return found

    def chunks(model):
        return farspan.patch(model, "dense", prefill_chunk=CHUNK)

    for a, b in zip(run(chunks), run(nullcontext), strict=True):
        assert close(a, b)


@pytest.mark.parametrize("name", BY_LENGTH)
@pytest.mark.parametrize("length", [50, 100])
def test_f01_tokens_on_either_side_of_the_boundary(name, length):
    """From 50 tokens, decoding crosses the boundary; Phi-3 drops its cache there and reads all of it anew."""
    batch = padded((length, length - 9))
    want = decode(seeded(BY_LENGTH[name]), batch, new=30)
    model = seeded(BY_LENGTH[name])
    with farspan.patch(model, "dense", prefill_chunk=17):
        got = decode(model, batch, new=30)
    assert torch.equal(got, want)


# --- f13: calls that need gradients -------------------------------------------------------------------------


def gradients(model, ids, **how):
    model.zero_grad()
    with torch.enable_grad():
        model(ids, labels=ids, **how).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "llama"])
@pytest.mark.parametrize("training", [True, False])
def test_f13_gradients_are_those_of_the_whole_call(name, training):
    model, ids = make(name).train(training), prompt(1, 60)
    want = gradients(model, ids)
    with farspan.patch(model, "dense", prefill_chunk=CHUNK) as patched:
        got = gradients(model, ids)
        assert patched.report().notices == {
            "prefill_chunk did not cut it: it needs gradients (torch.no_grad() avoids that)": 1
        }
        assert "in 1 calls of the model: prefill_chunk did not cut it" in str(patched.report())
        patched.reset_report()
        logits(model.eval(), ids)  # without gradients it is cut
        assert patched.report().notices == {}
        assert patched.report().layers[0].phases["prefill"].calls > 1
    assert got.keys() == want.keys()
    for key, x in got.items():
        assert (x - want[key]).abs().max() <= 1e-4 * want[key].abs().max().clamp(min=1e-3), key


def test_f13_gradients_of_inputs_and_of_cached_keys_alone():
    model = make("llama").requires_grad_(False)
    embeddings = model.get_input_embeddings()(prompt(1, 60)).requires_grad_()
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    want, embeddings.grad = embeddings.grad, None
    with farspan.patch(model, "dense", prefill_chunk=CHUNK):
        model(inputs_embeds=embeddings).logits.square().mean().backward()
    assert torch.allclose(embeddings.grad, want, rtol=1e-3, atol=1e-7)

    def of_the_cache():  # as peft's prefix tuning trains it
        draw = torch.Generator().manual_seed(0)
        keys = [torch.randn(1, 2, 5, 16, generator=draw).requires_grad_() for _ in range(6)]
        cache = hf.DynamicCache(config=model.config)
        for i in range(3):
            cache.update(keys[2 * i], keys[2 * i + 1], i)
        model(prompt(1, 60), **with_cache(model, cache)).logits.square().mean().backward()
        return [x.grad for x in keys]

    want = of_the_cache()
    with farspan.patch(model, "dense", prefill_chunk=CHUNK):
        got = of_the_cache()
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(got, want, strict=True))


# --- f11: tensors that may not lie along the tokens ---------------------------------------------------------


@dataclass
class Box:
    inside: object


def test_f11_foreign_tensors_are_found_at_any_depth():
    config, ids, x = make("llama").config, prompt(), torch.zeros(1, 4, 8)
    known = {"input_ids": ids, "position_ids": ids, "attention_mask": ids, "use_cache": True}
    known["past_key_values"] = hf.DynamicCache(config=config)
    known["past_key_values"].update(x[None], x[None], 0)
    assert foreign_tensors(config, known) == []
    for held in (
        x,
        [x],
        ({"image": x},),
        {"a": {"b": [None, x]}},
        BaseModelOutput(last_hidden_state=x),
        {"encoder": BaseModelOutput(hidden_states=(x,))},
        Box({1: Box([x])}),
    ):
        assert foreign_tensors(config, known | {"more": held}) == ["more"], held
    for held in (None, {}, {"image": None}, [1, "x"], Box(None), BaseModelOutput(), "text"):
        assert foreign_tensors(config, known | {"more": held}) == [], held


def test_f11_a_call_with_foreign_tensors_is_left_whole_and_says_so():
    model, ids = make("llama"), prompt(1, 60)
    want = logits(model, ids)
    with farspan.patch(model, "dense", prefill_chunk=CHUNK) as patched, torch.no_grad():
        hidden = model.model(ids, mm_encoder_outputs={"image": torch.zeros(1, 4, 8)}).last_hidden_state
        report = patched.report()
    assert close(model.lm_head(hidden), want)
    assert report.layers[0].phases["prefill"].calls == 1
    [notice] = report.to_dict()["notices"]
    assert notice == "prefill_chunk did not cut it: mm_encoder_outputs may not lie along the tokens"


# --- f10: what the decoder's output holds -------------------------------------------------------------------


def kosmos2_5():
    sizes = {"embed_dim": 64, "layers": 2, "ffn_dim": 96, "attention_heads": 4, "init_std": 0.2}
    still = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    return Kosmos2_5TextForCausalLM(
        Kosmos2_5TextConfig(vocab_size=128, max_position_embeddings=512, pad_token_id=0, **sizes, **still)
    )


def mllama():
    common = {key: value for key, value in COMMON.items() if key != "head_dim"}
    config = MllamaTextConfig(**common, **UNTIED, cross_attention_layers=[], rope_parameters=DEFAULT)
    return hf.MllamaForCausalLM(config)


@pytest.mark.parametrize("build", [kosmos2_5, mllama])
def test_f10_where_get_decoder_gives_a_whole_causal_lm(build):
    model, ids = seeded(build), prompt(1, 60)
    assert "ForCausalLM" in type(model.get_decoder()).__name__
    with torch.no_grad():
        want = model(ids, output_hidden_states=True)
        loss = model(ids, labels=ids).loss
    tokens = decode(model, ids)
    with farspan.patch(model, "dense", prefill_chunk=CHUNK) as patched, torch.no_grad():
        got = model(ids, output_hidden_states=True)
        assert patched.report().layers[0].phases["prefill"].calls == 2
        assert close(got.logits, want.logits)
        assert torch.allclose(model(ids, labels=ids).loss, loss)
        assert len(got.hidden_states) == len(want.hidden_states)
        assert all(map(close, got.hidden_states, want.hidden_states))
        for keep in (1, 30, torch.tensor([3, 59])):
            kept = want.logits[:, -keep:] if isinstance(keep, int) else want.logits[:, keep]
            assert close(logits(model, ids, logits_to_keep=keep), kept)
        assert torch.equal(decode(model, ids), tokens)


def test_f10_outputs_are_joined_along_the_tokens_or_refused():
    a, b = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    sizes = [{5}, {4}]
    assert torch.equal(_joined("x", [a, b], sizes), torch.cat([a, b], 1))
    [first, none] = _joined("x", [(a, None), (b, None)], sizes)
    assert torch.equal(first, torch.cat([a, b], 1)) and none is None
    assert _joined("x", ["before", "after"], sizes) == "after"
    for parts in ([a, a], [a[0, 0, 0], b[0, 0, 0]], [(a, b), (b, b)]):
        with pytest.raises(FarspanError, match=r"The output 'x' of the chunks.*without prefill_chunk"):
            _joined("x", parts, sizes)


def test_a_long_call_without_a_cache_is_left_whole_and_says_so():
    model, ids = make("llama"), prompt(1, 60)
    with farspan.patch(model, "dense", prefill_chunk=CHUNK) as patched:
        logits(model, ids, use_cache=False)
        logits(model, ids[:, :30], use_cache=False)  # short enough anyway
    assert patched.report().summary["notices"] == {"prefill_chunk did not cut it: it keeps no KV cache": 1}
