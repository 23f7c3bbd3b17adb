"""Models that something else has wrapped, quantised or built around, and those that are refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from small_models import (
    BOS,
    COMMON,
    EOS,
    PAD,
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
from transformers import DynamicCache

import farspan
from farspan.runtime.hf.releases import cache_name

SPARSE = "quest:k=16,page=4,dense_layers=0"
SPECIAL = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
IMAGE = 100  # the token that stands for a piece of an image


def check(model, batch=None, **how):
    """Dense gives the model's own tokens, a sparse method reads less, nothing of a patch stays behind."""
    batch = padded() if batch is None else batch
    expected, tokens = logits(model, batch), decode(model, batch)
    beams = decode(model, batch, 8, num_beams=2)
    before = snapshot(model)
    with farspan.patch(model, **how):
        pass
    assert snapshot(model) == before
    with farspan.patch(model, **how) as patched:
        assert close(logits(model, batch), expected, batch.get("attention_mask"))
        assert torch.equal(decode(model, batch), tokens)
        assert torch.equal(decode(model, batch, 8, num_beams=2), beams)
    assert patched.report().summary["decode_density"] == 1.0
    with farspan.patch(model, SPARSE) as patched:
        decode(model, batch)
    assert patched.report().summary["decode_density"] < 1
    assert torch.equal(decode(model, batch), tokens)


# --- wrappers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_layers_that_accelerate_offloads_to_the_cpu(name, chunk):
    from accelerate import cpu_offload

    model = cpu_offload(make(name), execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in model.parameters())
    check(model, prefill_chunk=chunk)


PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
PLACES |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}


def test_layers_that_accelerate_dispatches_to_disk(tmp_path):
    from accelerate import dispatch_model

    plain = make("llama")
    expected = decode(plain, padded())
    model = dispatch_model(plain, PLACES, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(p.is_meta for p in model.parameters())
    check(model)
    with farspan.patch(model):
        assert torch.equal(decode(model, padded()), expected)


def test_a_device_map_of_from_pretrained(tmp_path):
    make("llama").save_pretrained(tmp_path / "model")
    model = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=PLACES, offload_folder=tmp_path / "weights"
    )
    check(model.eval())


def test_lora():
    model = get_peft_model(
        make("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    check(model.eval())
    inner = model.get_base_model()
    with farspan.patch(model), pytest.raises(farspan.FarspanError, match="patched already"):
        farspan.patch(inner)


def test_lora_on_a_patched_model():
    model = make("llama")
    with farspan.patch(model, SPARSE) as patched:
        wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
        decode(wrapped, padded())
    assert patched.report().summary["decode_density"] < 1
    check(wrapped)


def test_prefix_tuning():
    """Its virtual tokens are a cache that peft makes; before padding they would be a hole in the mask.

    peft 0.21 passes that cache by its old name, and ``generate`` of transformers 5.24 drops it: the mask has
    entries for the virtual tokens all the same, so a padded batch is refused for its mask's length.
    """
    model = get_peft_model(
        make("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    check(model, {"input_ids": prompt(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.long)})
    renamed = cache_name(model.get_base_model()) == "cache"
    says = "one entry for each of 0 cached" if renamed else "zeros between ones in row 1"
    with farspan.patch(model), pytest.raises(farspan.FarspanError, match=says):
        decode(model, padded())


def test_weights_quantised_by_torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(make("llama"), {torch.nn.Linear})
    assert "quantized" in type(model.model.layers[0].self_attn.q_proj).__module__
    check(model)


# --- around a text backbone -------------------------------------------------------------------------------

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def llava():
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
    text = {**COMMON, "model_type": "llama"}
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return hf.LlavaForConditionalGeneration(config)


def qwen2_vl():
    text = {**COMMON, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {"embed_dim": 32, "depth": 1, "num_heads": 2, "hidden_size": 64}
    tokens = {
        "image_token_id": IMAGE,
        "video_token_id": 101,
        "vision_start_token_id": 102,
        "vision_end_token_id": 103,
    }
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    )


def gemma3():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**COMMON, "layer_types": kinds, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    tokens = {"image_token_index": IMAGE, "image_token_id": IMAGE, "mm_tokens_per_image": 4}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    )


def seeded(build):
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("build", [llava, qwen2_vl, gemma3])
def test_text_of_a_multimodal_model(build, chunk):
    model = seeded(build)
    check(model, padded((60, 41)), prefill_chunk=chunk)


def with_image(**more):
    ids = prompt(1, 60) % 90 + 5
    ids[0, 4:10] = torch.tensor([102, IMAGE, IMAGE, IMAGE, IMAGE, 103])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


@pytest.mark.parametrize("chunk", [None, 24])
def test_images_between_causal_text(chunk):
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    check(seeded(llava), with_image(pixel_values=pixels), prefill_chunk=chunk)
    patches = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    image["mm_token_type_ids"] = (with_image()["input_ids"] == IMAGE).long()
    check(seeded(qwen2_vl), with_image(**image), prefill_chunk=chunk)


def test_images_that_attend_to_themselves_are_refused():
    model, batch = seeded(gemma3), with_image()
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    batch["pixel_values"] = torch.zeros(1, 3, 28, 28)
    with farspan.patch(model), pytest.raises(farspan.FarspanError, match=r"image tokens.*does not serve"):
        logits(model, batch)


# --- other families ---------------------------------------------------------------------------------------


def gpt2(**more):
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(**SPECIAL, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2, **more)
    )


def neox():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SPECIAL, **sizes, initializer_range=0.2))


def opt():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
    return hf.OPTForCausalLM(hf.OPTConfig(**SPECIAL, **sizes, word_embed_proj_dim=64, init_std=0.2))


@pytest.mark.parametrize("build", [gpt2, neox, opt])
def test_older_families_that_use_the_same_interface(build):
    check(seeded(build))


MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 3,
}
LATENT = {k: v for k, v in (COMMON | MLA).items() if k != "head_dim"}
BART = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SHARED = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 2}
SHARED |= {
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": [96] * 4,
}
SHARED |= {"activation_sparsity_pattern": [0.0] * 4}
CHUNKED = {"num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 64}
REFUSED = {
    "DeepseekV3": (lambda: hf.DeepseekV3Config(**LATENT, n_group=2, topk_group=1), "latent attention"),
    "DeepseekV2": (lambda: hf.DeepseekV2Config(**LATENT), "latent attention"),
    "Bart": (lambda: hf.BartConfig(**SPECIAL, **BART), "encoder-decoder models are not causal LMs"),
    "T5": (lambda: hf.T5Config(vocab_size=VOCAB, d_model=64, num_layers=2), "encoder-decoder"),
    "Bert": (lambda: hf.BertConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=1), "not causal"),
    "GPT2": (lambda: hf.GPT2Config(**SPECIAL, n_embd=48, add_cross_attention=True), "cross-attention"),
    "Bloom": (lambda: hf.BloomConfig(**SPECIAL, hidden_size=64, n_layer=2, n_head=4), "AttentionInterface"),
    "Mamba": (lambda: hf.MambaConfig(**SPECIAL, hidden_size=64, num_hidden_layers=2), "AttentionInterface"),
    "Gemma3n": (lambda: hf.Gemma3nTextConfig(**{**COMMON, **SHARED}), "use another layer's keys"),
    "Llama4": (lambda: hf.Llama4TextConfig(**{**COMMON, **CHUNKED}), "'chunked_attention' are not served"),
}
HEADS = {
    "Bart": "ForConditionalGeneration",
    "T5": "ForConditionalGeneration",
    "GPT2": "LMHeadModel",
    "Bert": "Model",
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_a_reason_before_anything_is_changed(family):
    config, reason = REFUSED[family]
    model = getattr(hf, family + HEADS.get(family, "ForCausalLM"))(config())
    before = snapshot(model)
    for spec in ("dense", SPARSE):
        with pytest.raises(farspan.Unsupported, match=reason) as error:
            farspan.patch(model, spec)
        assert type(model).__name__ in str(error.value) and "\n" not in str(error.value)
        assert any(reason in why for why in error.value.reasons)
        assert snapshot(model) == before


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "HuggingFaceTB/SmolLM2-135M", None])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(
        farspan.Unsupported, match=f"cannot patch a {type(thing).__name__}: .*PreTrainedModel"
    ):
        farspan.patch(thing)


# --- calls that cannot be served --------------------------------------------------------------------------


def test_attention_weights_are_refused_however_they_are_asked_for():
    model, ids = make("llama"), prompt()
    expected = logits(model, ids)
    with farspan.patch(model):
        for ask in (
            lambda: model(ids, output_attentions=True),
            lambda: decode(model, ids, output_attentions=True, return_dict_in_generate=True),
            lambda: model.model(ids, output_attentions=True),
        ):
            with pytest.raises(farspan.FarspanError, match="output_attentions=True was given"):
                ask()
        assert close(logits(model, ids), expected)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    before = snapshot(model)
    with pytest.raises(farspan.FarspanError, match="output_attentions"):
        farspan.patch(model)
    assert snapshot(model) == before
    assert model(ids).attentions is not None


class _Quantised(hf.cache_utils.QuantizedLayer):
    """What QuantizedCache holds, without the quantisation library that it wants to import."""

    _quantize = _dequantize = None


def caches(model):
    length = {"max_cache_len": 64}
    yield "StaticLayer", hf.StaticCache(config=model.config, **length)
    yield "_Quantised", hf.Cache(layers=[_Quantised() for _ in range(3)])
    yield "_Quantised", hf.Cache(layer_class_to_replicate=_Quantised)
    offloading = DynamicCache(config=model.config)
    offloading.offloading = True  # its constructor wants a GPU
    yield "an offloading cache", offloading
    yield "an offloading cache|EncoderDecoderCache", hf.EncoderDecoderCache(DynamicCache(), DynamicCache())
    yield "a tuple", ((torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16)),) * 3


def test_caches_that_cannot_be_served_are_refused_and_left_alone():
    model, ids = make("llama"), prompt()
    with farspan.patch(model):
        for what, cache in caches(model):
            layers = list(getattr(cache, "layers", []))
            with pytest.raises(farspan.FarspanError, match=f"{what}.*DynamicCache\\(config") as error:
                logits(model, ids, past_key_values=cache)
            assert "\n" not in str(error.value)
            assert list(getattr(cache, "layers", [])) == layers
        with pytest.raises(farspan.FarspanError, match="StaticLayer"):
            decode(model, ids, cache_implementation="static")
        assert torch.equal(decode(model, ids), decode(make("llama"), ids))


def test_a_mixed_cache_is_refused_without_being_half_adopted():
    model = make("llama")
    cache = DynamicCache(config=model.config)
    cache.layers[2] = _Quantised()
    before = list(cache.layers)
    with farspan.patch(model), pytest.raises(farspan.FarspanError, match="_Quantised"):
        logits(model, prompt(), past_key_values=cache)
    assert cache.layers == before


def test_attention_dropout_is_refused_while_training():
    model = make("llama", attention_dropout=0.1)
    with farspan.patch(model):
        logits(model, prompt())
        with pytest.raises(
            farspan.FarspanError, match=r"attention_dropout is 0\.1, and farspan has no attention dropout"
        ):
            model.train()(prompt())
