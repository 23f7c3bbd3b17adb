"""Finding, loading and stretching models, and the sentence each failure ends in."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, Gemma3TextConfig, GPT2Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from farspan import FarspanError, Unsupported
from farspan.attention.ops.processor import bf16_is_slow
from farspan.runtime.models import check_length, encode_prompt, load, positions
from farspan.runtime.rope import parse_rope, stretch

# --- the alias -----------------------------------------------------------------------------------


def test_smollm2_answers(smollm2):
    model, tokenizer = smollm2
    assert model.dtype == (torch.float32 if bf16_is_slow() else torch.bfloat16)
    assert positions(model) == 8192 == tokenizer.model_max_length
    ids = encode_prompt(tokenizer, "What is the capital of France?")
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_smollm2_tokenizer_is_the_published_one(smollm2):
    _, tokenizer = smollm2
    # The published tokenizer isolates digits before anything else, so a space pair before one stays a pair.
    assert tokenizer.tokenize("in  1984") == ["in", "ĠĠ", "1", "9", "8", "4"]
    chat = tokenizer.decode(encode_prompt(tokenizer, "Hi")[0])
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    expected = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat == expected
    text = "Straße, naïve café — 3.14 €"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_cached_model_needs_no_network_and_no_gguf(smollm2):
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "import socket; socket.socket.connect = lambda *a: (_ for _ in ()).throw(OSError('no network'))\n"
        "import farspan; model, tokenizer = farspan.load('smollm2-135m'); print(model.num_parameters())"
    )
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "134515008", run.stderr


# --- folders and hub ids -------------------------------------------------------------------------


def test_local_folder_round_trip(tmp_path, tiny_llama, smollm2):
    saved = tiny_llama(vocab_size=49152)
    saved.save_pretrained(tmp_path / "model")
    smollm2[1].save_pretrained(tmp_path / "model")
    model, tokenizer = load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), model.parameters(), strict=True))
    assert not model.training and tokenizer.padding_side == "left" and tokenizer.pad_token_id is not None
    half, _ = load(str(tmp_path / "model"), dtype="bfloat16")
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("slow", [False, True])
def test_bfloat16_on_a_cpu_without_instructions_for_it(tmp_path, tiny_llama, smollm2, monkeypatch, slow):
    """As saved where the CPU multiplies it; else float32, unless a dtype or a device is asked for."""
    monkeypatch.setattr(sys.modules[load.__module__], "bf16_is_slow", lambda: slow)
    tiny_llama(vocab_size=49152).to(torch.bfloat16).save_pretrained(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    assert load(tmp_path)[0].dtype == (torch.float32 if slow else torch.bfloat16)
    assert load(tmp_path, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert load(tmp_path, device_map="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("./nowhere", "There is no folder or file './nowhere'"),
        ("/no/such/model", "There is no folder or file '/no/such/model'"),
        ("smolm2-135m", "did you mean the alias 'smollm2-135m'"),
        ("SmolLM2-135M", "did you mean the alias 'smollm2-135m'"),
    ],
)
def test_unknown_model(name, sentence):
    with pytest.raises(FarspanError, match=sentence):
        load(name)


def test_unreadable_folders(tmp_path, tiny_llama):
    with pytest.raises(FarspanError, match="Could not load a causal language model from"):
        load(tmp_path)
    tiny_llama().config.save_pretrained(tmp_path)  # a configuration without weights
    with pytest.raises(FarspanError, match="Could not load a causal language model from"):
        load(tmp_path)
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(FarspanError, match="is not a GGUF file; give a GGUF file, a model's folder"):
        load(tmp_path / "weights.bin")


def test_hub_that_cannot_be_reached(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    code = "import farspan\ntry: farspan.load('nobody/nothing')\nexcept farspan.FarspanError as e: print(e)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "Could not load 'nobody/nothing': the Hugging Face hub cannot be reached" in run.stdout, run.stderr
    assert run.stdout.count("\n") == 1


# --- positions -----------------------------------------------------------------------------------


def test_a_prompt_past_the_positions(tiny_llama):
    model = tiny_llama(max_position_embeddings=64)
    check_length(model, 64)
    with pytest.raises(FarspanError, match=r"has 129 tokens.*64 positions.*rope='yarn:3'"):
        check_length(model, 129)
    with pytest.warns(UserWarning, match="64 positions"):
        check_length(model, 65, strict=False)


def published_yarn(theta: float, d: int, s: float, original: int) -> list[float]:
    """YaRN's inverse frequencies written out from the paper (2309.00071, eq. 20-23; alpha 1, beta 32)."""

    # The (fractional) pair of channels that turns `rotations` times in `original` positions.
    def dimension(rotations: float) -> float:
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), d - 1)
    result = []
    for i in range(d // 2):
        frequency = theta ** (-2 * i / d)
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        result.append(frequency * (1 - interpolated) + frequency / s * interpolated)
    return result


@pytest.mark.parametrize(("rope", "s"), [("yarn:4", 4.0), ("yarn:16384", 4.0), ("yarn:1.5", 1.5)])
def test_yarn_frequencies(tiny_llama, rope, s):
    theta = {"rope_type": "default", "rope_theta": 100000.0}
    config = LlamaConfig(**(tiny_llama().config.to_dict() | {"rope_parameters": theta, "head_dim": 64}))
    stretch(config, rope)
    model = type(tiny_llama())(config)
    assert positions(model) == s * 4096 and config.rope_parameters["rope_theta"] == 100000.0
    rotary = model.model.rotary_emb
    expected = torch.tensor(published_yarn(100000.0, 64, s, 4096))
    torch.testing.assert_close(rotary.inv_freq, expected, rtol=1e-5, atol=0)
    assert rotary.attention_scaling == pytest.approx(0.1 * math.log(s) + 1)


@pytest.mark.parametrize("rope", ["dynamic:4", "dynamic:16384"])
def test_dynamic_frequencies_are_those_of_the_target_length_from_the_first_token(tiny_llama, rope):
    model = tiny_llama()
    plain = LlamaConfig(**model.config.to_dict())
    plain.rope_parameters = plain.rope_parameters | {"rope_type": "dynamic", "factor": 1.0}
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](plain, seq_len=4 * 4096)
    config = LlamaConfig(**model.config.to_dict())
    stretch(config, rope)
    rotary = type(model)(config).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, expected)
    before = rotary.inv_freq.clone()
    for length in (10, 10_000, 16_384, 20):  # never recomputed, whatever has been read
        rotary(torch.zeros(1), torch.arange(length)[None])
        assert torch.equal(rotary.inv_freq, before)


def test_a_stretched_model_survives_saving(tmp_path, tiny_llama, smollm2):
    tiny_llama(vocab_size=49152).save_pretrained(tmp_path / "a")
    smollm2[1].save_pretrained(tmp_path / "a")
    model, tokenizer = load(tmp_path / "a", rope="yarn:2")
    assert tokenizer.model_max_length == 8192
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    again, _ = load(tmp_path / "b")
    assert positions(again) == 8192
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_gemma3_stretches_full_attention_only():
    config = Gemma3TextConfig(num_hidden_layers=6, max_position_embeddings=1024)
    local = dict(config.rope_parameters["sliding_attention"])
    stretch(config, "yarn:4")
    assert config.rope_parameters["sliding_attention"] == local
    assert config.rope_parameters["full_attention"]["rope_type"] == "yarn"
    assert config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    "rope", ["yarn", "yarn:", "yarn:one", "yarn:0.5", "yarn:-4", "yarn:nan", "linear:4", ""]
)
def test_bad_rope(rope):
    with pytest.raises(FarspanError, match="yarn:4"):
        parse_rope(rope)


def test_what_cannot_be_stretched():
    with pytest.raises(FarspanError, match="means 2048 positions, but llama already has 4096"):
        stretch(LlamaConfig(max_position_embeddings=4096), "yarn:2048")
    with pytest.raises(Unsupported, match="no rotary position embedding"):
        stretch(GPT2Config(), "yarn:4")
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(max_position_embeddings=131072, rope_parameters=llama3)
    with pytest.raises(Unsupported, match="already stretched to 131072 by 'llama3'"):
        stretch(config, "yarn:4")


# --- prompts -------------------------------------------------------------------------------------


def test_prompts(smollm2):
    _, tokenizer = smollm2
    plain = encode_prompt(tokenizer, "one two", chat=False)
    assert plain.shape == (1, 2) and tokenizer.decode(plain[0]) == "one two"
    with pytest.raises(FarspanError, match="prompt is empty"):
        encode_prompt(tokenizer, "", chat=False)
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    assert torch.equal(encode_prompt(bare, "one two"), plain)
    with pytest.raises(FarspanError, match="no chat template"):
        encode_prompt(bare, "one two", chat=True)
