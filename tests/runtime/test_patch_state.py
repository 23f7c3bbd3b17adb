"""The state of a patched model: config edits, attention switched, copies; and the numbers patch takes."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
import transformers as hf
from small_models import COMMON, PAD, close, decode, logits, make, padded, prompt, shared, snapshot

import farspan
from farspan.attention.checks import whole_number
from farspan.attention.errors import FarspanError, SpecError
from farspan.runtime.hf import with_cache
from farspan.runtime.hf.install import _switched_off
from farspan.runtime.session import Session

SPARSE = "window:w=4,sinks=1"


def llava():
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model", "projection_dim": 32}
    text = {**COMMON, "model_type": "llama"}
    torch.manual_seed(0)
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=100)
    return hf.LlavaForConditionalGeneration(config).eval()


# --- f06: changes to the config ---------------------------------------------------------------------------


def test_f06_config_edits_survive_the_patch():
    model = make("llama")
    config, implementation = model.config, model.config._attn_implementation
    config.gone = 1
    with farspan.patch(model):
        model.config.pad_token_id = 5
        model.config.use_cache = False
        model.config.note = ["kept"]
        del model.config.gone
        model.config.id2label["x"] = "changed in place"
        assert model.model.config.note == ["kept"]  # one copy for all modules
    assert model.config is config is model.model.config is model.model.layers[0].self_attn.config
    assert (config.pad_token_id, config.use_cache, config.note) == (5, False, ["kept"])
    assert not hasattr(config, "gone")
    assert config.id2label["x"] == "changed in place"
    assert config._attn_implementation == implementation


def test_f06_what_was_not_edited_is_as_it_was():
    model = make("llama")
    before = snapshot(model)
    want = copy.deepcopy(vars(model.config))
    with farspan.patch(model):
        model.config.note = 1
        decode(model, prompt())
        del model.config.note
    assert vars(model.config) == want and list(vars(model.config)) == list(want)
    assert snapshot(model) == before


def test_f06_embeddings_resized_under_a_patch_are_saved_and_loaded(tmp_path):
    model, ids = make("llama"), prompt(1, 20)
    with farspan.patch(model):
        model.resize_token_embeddings(140)
    assert model.config.vocab_size == 140
    loss = model(ids, labels=ids).loss
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids, labels=ids).loss, loss)


def test_f06_nested_configs_keep_their_edits():
    model = llava()
    outer, text, vision = model.config, model.config.text_config, model.config.vision_config
    ids = prompt(1, 20) % 90 + 5
    with farspan.patch(model):
        assert model.config.vision_config is vision  # no part of the patch
        assert model.config.text_config is model.get_decoder().config is not text
        model.config.note = 1
        model.config.text_config.note = 2
        model.config.vision_config.note = 3
        model.config.text_config = model.config.text_config
        model.resize_token_embeddings(140)
        decode(model, ids)
    assert model.config is outer and outer.text_config is text and outer.vision_config is vision
    assert (outer.note, text.note, vision.note, text.vocab_size) == (1, 2, 3, 140)
    assert model.get_decoder().config is text
    assert text._attn_implementation == outer._attn_implementation != "farspan"


def test_f06_a_config_given_while_patched_stays():
    model = llava()
    text = copy.deepcopy(model.config.text_config)
    with farspan.patch(model):
        model.config.text_config = text
    assert model.config.text_config is text


def test_f06_models_that_share_a_config():
    """Each edits its own copy; the shared config, and with it the other model, has an edit after remove()."""
    a = make("llama")
    b = hf.LlamaForCausalLM(a.config).eval()
    config = a.config
    with farspan.patch(a):
        a.config.pad_token_id = 5
        assert b.config.pad_token_id == PAD
        with farspan.patch(b):
            b.config.note = 1
        assert config.note == 1
    assert a.config is b.config is config
    assert (config.pad_token_id, config.note) == (5, 1)
    assert config._attn_implementation != "farspan"


# --- f14: another attention under a patch -----------------------------------------------------------------


def test_f14_another_attention_is_reported_and_stays():
    model, ids = make("llama"), prompt(1, 60)
    dense = logits(model, ids)
    tokens = decode(model, ids)
    with farspan.patch(model, SPARSE, prefill_chunk=24) as patched:
        sparse = logits(model, ids)
        assert not close(sparse, dense)
        patched.reset_report()
        model.set_attn_implementation("eager")
        with pytest.warns(UserWarning, match=r"'eager'.*farspan does nothing: .*remove\(\)"):
            assert close(logits(model, ids), dense)
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error")
            assert torch.equal(decode(model, ids, new=3), tokens[:, :3])
            static = hf.StaticCache(config=model.config, max_cache_len=80)
            assert torch.equal(decode(model, ids, new=3, **with_cache(model, static)), tokens[:, :3])
        report = patched.report()
        reason = "the model was set to the attention 'eager', so farspan did nothing"
        assert report.summary["notices"] == report.to_dict()["notices"] == {reason: 7}
        assert f"in 7 calls of the model: {reason}" in str(report)
        assert report.summary["prefill_density"] is None
        model.set_attn_implementation("farspan")
        assert torch.equal(logits(model, ids), sparse)
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"  # the user's choice
    assert close(logits(model, ids), dense)


def test_f14_set_back_to_farspan_leaves_no_trace():
    model = make("llama")
    before = snapshot(model)
    with farspan.patch(model):
        model.set_attn_implementation("eager")
        model.set_attn_implementation("".join(["far", "span"]))  # another string object
    assert snapshot(model) == before


def test_f14_strict_raises_at_the_next_call():
    model, ids = make("llama"), prompt(1, 60)
    with farspan.patch(model, SPARSE, strict=True):
        logits(model, ids)
        model.set_attn_implementation("sdpa")
        with pytest.raises(FarspanError, match=r"set to the attention 'sdpa'.*remove\(\)") as error:
            logits(model, ids)
        assert "\n" not in str(error.value)
        model.set_attn_implementation("farspan")
        logits(model, ids)


def test_f14_over_ranks_every_other_attention_is_refused():
    """Its own attention would see one rank's share of the tokens."""
    decoder = make("llama").model
    with pytest.warns(UserWarning, match="set to the attention 'sdpa'"):
        assert _switched_off(decoder, Session(strict=False))
    with pytest.raises(FarspanError, match="set to the attention 'sdpa'"):
        _switched_off(decoder, Session(strict=False, mesh=object()))


def test_f14_the_text_of_a_multimodal_model():
    model, ids = llava(), prompt(1, 60) % 90 + 5
    dense = logits(model, ids)
    with farspan.patch(model, SPARSE) as patched:
        model.set_attn_implementation({"text_config": "eager"})
        with pytest.warns(UserWarning, match="'eager'"):
            assert close(logits(model, ids), dense)
        assert sum(patched.report().notices.values()) == 1
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation != "farspan"


# --- f15: copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"prefill_chunk": 24}], ids=str)
def test_f15_a_patched_model_is_neither_copied_nor_pickled(how):
    model = make("phi3")
    with farspan.patch(model, SPARSE, **how):
        parts = [
            model,
            model.model,
            model.model.layers,
            model.model.layers[0].self_attn,
            torch.nn.Sequential(model),
        ]
        for part in parts:
            for save in (
                copy.deepcopy,
                pickle.dumps,
                lambda x: torch.save(x, io.BytesIO()),
                lambda x: torch.save({"model": x}, io.BytesIO()),
            ):
                with pytest.raises(FarspanError, match=r"copied or pickled.*call remove\(\)") as error:
                    save(part)
                assert "\n" not in str(error.value)
    ids = prompt()
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), ids), logits(model, ids))


def test_f15_weights_are_saved_under_a_patch(tmp_path):
    import safetensors.torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, ids = make("llama", tie_word_embeddings=True), prompt()
    want = logits(model, ids)
    with farspan.patch(model, SPARSE, prefill_chunk=24):
        model.save_pretrained(tmp_path / "hf")
        safetensors.torch.save_model(model, tmp_path / "model.safetensors")
        torch.save(model.state_dict(), tmp_path / "weights.pt")
        accelerator = Accelerator(cpu=True)
        accelerator.save_model(model, tmp_path / "accelerate")
        prepared = accelerator.prepare(model)
        accelerator.save_state(tmp_path / "state")
        assert accelerator.unwrap_model(prepared) is model
        AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the process
    config = (tmp_path / "hf" / "config.json").read_text()
    assert "farspan" not in config
    assert close(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(), ids), want)
    for load in (
        lambda m: safetensors.torch.load_model(m, tmp_path / "model.safetensors"),
        lambda m: m.load_state_dict(torch.load(tmp_path / "weights.pt")),
        lambda m: safetensors.torch.load_model(m, tmp_path / "accelerate" / "model.safetensors"),
        lambda m: safetensors.torch.load_model(m, tmp_path / "state" / "model.safetensors"),
    ):
        other = make("llama", tie_word_embeddings=True, seed=1)
        load(other)
        assert torch.equal(logits(other, ids), want)


# --- f16: pad tokens inside a prompt ----------------------------------------------------------------------


def test_f16_a_pad_token_inside_a_prompt_without_a_mask():
    model, ids = shared("llama"), prompt(2, 40)
    ids[1, 20] = PAD
    mask = torch.ones_like(ids)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 2, "pad_token_id": PAD}
    want = model.generate(ids, attention_mask=mask, **how)
    with farspan.patch(model):
        says = (
            r"zeros between ones in row 1; .* returned\. If generate\(\) is called without a mask, it sets "
            r"the mask to 0 at every pad token of the prompt: pass attention_mask=torch\.ones_like"
        )
        with pytest.raises(FarspanError, match=says) as error:
            model.generate(ids, **how)
        assert "\n" not in str(error.value)
        assert torch.equal(model.generate(ids, attention_mask=mask, **how), want)


# --- numbers ----------------------------------------------------------------------------------------------


def test_layers_named_twice_are_refused():
    model = shared("llama")
    before = snapshot(model)
    for layers, twice in (
        ({2: SPARSE, -1: "dense"}, "layer 2 twice, as 2 and -1"),
        ({-3: SPARSE, 0: SPARSE}, "layer 0 twice, as -3 and 0"),
        ({1: SPARSE, np.int64(-2): SPARSE}, f"layer 1 twice, as 1 and {np.int64(-2)!r}"),
    ):
        with pytest.raises(SpecError, match=re.escape(twice)):
            farspan.patch(model, layers=layers)
    assert snapshot(model) == before


@pytest.mark.parametrize("number", [2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)], ids=repr)
def test_whole_numbers_of_other_libraries(number):
    model, batch = shared("llama"), padded()
    plain = {"prefill_chunk": 24, "crossover": 20, "measure_mass": 2, "layers": {2: "window:w=9"}}
    with farspan.patch(model, SPARSE, **plain) as patched:
        want, reads = decode(model, batch), patched.report().to_dict()["layers"]
    layers = {number if number.__hash__ else np.int32(-1): "window:w=9"}  # an array cannot be a key
    how = {"prefill_chunk": 12 * number, "crossover": 10 * number, "measure_mass": number, "layers": layers}
    with farspan.patch(model, SPARSE, **how) as patched:
        assert torch.equal(decode(model, batch), want)
        for got, was in zip(patched.report().to_dict()["layers"], reads, strict=True):
            for phase in ("prefill", "decode"):
                for name in ("method", "calls", "pairs", "fallbacks", "mass_rows", "mass_recall"):
                    assert got[phase][name] == was[phase][name]


@pytest.mark.parametrize(
    "wrong", [True, np.True_, torch.tensor(True), 2.0, np.float64(2), "2", None, np.array([2, 3])], ids=repr
)
def test_what_is_no_whole_number(wrong):
    assert whole_number(wrong) is None
    model = shared("llama")
    if wrong is not None:
        with pytest.raises(FarspanError, match="prefill_chunk is a number of tokens"):
            farspan.patch(model, prefill_chunk=wrong)
        with pytest.raises(FarspanError, match='crossover is "auto" or a number of keys'):
            farspan.patch(model, SPARSE, crossover=wrong)
    if getattr(wrong, "__hash__", None):
        with pytest.raises(SpecError, match="layers= takes layer numbers from 0 to 2"):
            farspan.patch(model, layers={wrong: "dense"})


def test_numbers_of_methods_and_of_ranks():
    from farspan.attention.sparse.quest import Quest

    assert Quest(k=np.int64(16)) == Quest(k=16)
    assert str(Quest(k=np.int64(16))) == str(Quest(k=16))
    with pytest.raises(SpecError, match="quest takes k"):
        Quest(k=np.True_)
    assert farspan.ContextParallel(size=np.int64(2), block=np.int32(8)) == farspan.ContextParallel(
        size=2, block=8
    )
    with pytest.raises(SpecError, match="size=True"):
        farspan.ContextParallel(size=True)


def test_f14_other_configs_of_a_multimodal_model_are_as_before():
    """set_attn_implementation("farspan") reaches the vision part too, which farspan does not serve."""
    model = llava()
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    with farspan.patch(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.set_attn_implementation("eager")
        model.set_attn_implementation("farspan")
    after = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert after == before
