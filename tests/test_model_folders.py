"""What a model's folder may carry, and what loading, `generate` and evaluations make of it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from farspan import FarspanError
from farspan.cli import main
from farspan.runtime.models import check_length, load

PROMPT, NEW = "the grass is green and the sky", 12
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<answer>"


def letters() -> PreTrainedTokenizerFast:
    """ASCII as token ids; 0 is padding, 1 the beginning, 2 the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocab = special | {chr(number): number for number in range(3, 128)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any, tiny_llama: Any) -> Path:
    """A random model of 128 words with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "whole"
    tiny_llama(initializer_range=0.3, max_position_embeddings=1024).save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of `whole` with settings added to files: folder(config={...}, generation_config={...})."""

    def make(**files: dict[str, Any]) -> Path:
        copy = tmp_path / "model"
        shutil.copytree(whole, copy, dirs_exist_ok=True)
        for name, more in files.items():
            path = copy / f"{name}.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | more))
        return copy

    return make


@pytest.fixture
def command(capfd: Any) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(item) for item in arguments])
        sys.stdout.flush()
        return int(ended.value.code or 0), *capfd.readouterr()

    yield run


def sentence(result: tuple[int, str, str]) -> str:
    """The one line that bad input ends in."""
    code, out, err = result
    assert code == 2 and not out, (code, out, err)
    [line] = [line for line in err.splitlines() if line.strip()]
    assert line.startswith("farspan: ") and line.endswith("."), line
    return line


def generated(folder: Path, **settings: Any) -> str:
    """What transformers' own `generate` writes: the oracle."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = letters()(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **settings)
    return letters().decode(out[0, ids.shape[1] :], skip_special_tokens=True)


END = {"eos_token_id": [*range(60, 128)]}
KEPT: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": [*range(3, 128, 2)]},
    "repetition_penalty": {"repetition_penalty": 5.0},
    "stop_strings": {"stop_strings": ["("]},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "bad_words_ids": {"bad_words_ids": [[number] for number in range(60, 128)]},
    "sequence_bias": {"sequence_bias": [[[number], -50.0] for number in range(3, 60)]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [*range(3, 100)]},
    "forced_eos_token_id": {"forced_eos_token_id": 77},
    "guidance_scale": {"guidance_scale": 3.0},
    "watermarking_config": {"watermarking_config": {"bias": 3.0}},
    "eos_token_id": END,
    "min_new_tokens": {"min_new_tokens": 3, **END},
}
SET_ASIDE = {
    "use_cache": False,
    "cache_implementation": "static",
    "token_healing": True,
    "prefill_chunk_size": 4,
    "assistant_early_exit": 1,
    "min_new_tokens": NEW + 1,
}
WITHOUT_EFFECT = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_attentions": True,
    "max_length": 3,
    "do_sample": True,
    "temperature": 9.0,
    "top_k": 3,
    "length_penalty": 3.0,
    "chat_format": "chatml",
}


@pytest.mark.parametrize("method", ["dense", "window:w=64,sinks=4"])  # the window holds all of it
@pytest.mark.parametrize("name", KEPT)
def test_f19_generate_keeps_the_models_settings(folder: Any, command: Any, name: str, method: str) -> None:
    made = folder(generation_config=KEPT[name])
    given = {"tokenizer": letters()} if name == "stop_strings" else {}
    want = generated(made, **given)
    code, out, err = command(
        "generate", "-m", made, "-p", PROMPT, "--max-new-tokens", NEW, "--no-chat", "--method", method
    )
    assert (code, out) == (0, want + "\n"), err
    assert "Not used of" not in err


def test_kept_settings_matter_here(whole: Path, folder: Any) -> None:
    """Each of them changes what this model writes, but for speculation, which must not."""
    written = {"": generated(whole)}
    for name, settings in KEPT.items():
        given = {"tokenizer": letters()} if name == "stop_strings" else {}
        written[name] = generated(folder(generation_config=settings), **given)
        shutil.rmtree(folder())
    assert [name for name in KEPT if written[name] == written[""]] == ["prompt_lookup_num_tokens"]
    assert written["min_new_tokens"] != written["eos_token_id"]


@pytest.mark.parametrize("name", SET_ASIDE)
def test_f19_generate_says_which_setting_it_cannot_keep(
    whole: Path, folder: Any, command: Any, name: str
) -> None:
    made = folder(generation_config={name: SET_ASIDE[name]})
    code, out, err = command("generate", "-m", made, "-p", PROMPT, "--max-new-tokens", NEW, "--no-chat")
    assert (code, out) == (0, generated(whole) + "\n"), err
    [line] = [line for line in err.splitlines() if "Not used of" in line]
    assert line.startswith(f"Not used of the model's generation config: {name}={SET_ASIDE[name]!r} (")
    assert line.endswith(").")


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_f19_settings_that_the_options_decide(whole: Path, folder: Any, command: Any, name: str) -> None:
    made = folder(generation_config={name: WITHOUT_EFFECT[name]})
    code, out, err = command("generate", "-m", made, "-p", PROMPT, "--max-new-tokens", NEW, "--no-chat")
    assert (code, out) == (0, generated(whole) + "\n"), err
    assert "Not used of" not in err and "Traceback" not in err


def test_f19_a_setting_that_transformers_refuses_ends_in_a_sentence(folder: Any, command: Any) -> None:
    made = folder(generation_config={"bad_words_ids": [[5000]]})
    said = sentence(command("generate", "-m", made, "-p", PROMPT, "--no-chat"))
    assert "which sets bad_words_ids" in said and "generation_config.json" in said


# --- chat ------------------------------------------------------------------------------------------------


def needle(model: Path, out: Path, *more: str) -> list[object]:
    size = ("--lengths", 700, "--depths", "0.5", "--samples", 1, "--text", model / "prose.txt")
    return ["eval", "needle", "-m", model, "--out", out, *size, "--json", *more]


def test_no_chat_of_an_evaluation_is_part_of_its_folder(folder: Any, command: Any, tmp_path: Path) -> None:
    made = folder(tokenizer_config={"chat_template": TEMPLATE})
    (made / "prose.txt").write_text("The grass is green. " * 50)
    length = {}
    for name, more in (("default", ()), ("chat", ("--chat",)), ("plain", ("--no-chat",))):
        code, _, err = command(*needle(made, tmp_path / name, *more))
        assert code == 0, err
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.get("chat") is (False if more == ("--no-chat",) else None)
        row = json.loads((tmp_path / name / "samples.jsonl").read_text().splitlines()[0])
        length[name] = row["prompt_sha256"]
    assert length["default"] == length["chat"] != length["plain"]
    assert command(*needle(made, tmp_path / "default", "--chat"))[0] == 0
    assert "chat" in sentence(command(*needle(made, tmp_path / "default", "--no-chat")))
    assert "chat" in sentence(command(*needle(made, tmp_path / "plain")))


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for", {"rag": "x"}])
def test_a_broken_template_ends_in_a_sentence(
    folder: Any, command: Any, tmp_path: Path, template: Any
) -> None:
    named = template if isinstance(template, str) else [{"name": "rag", "template": "x"}]
    made = folder(tokenizer_config={"chat_template": named})
    (made / "prose.txt").write_text("The grass is green. " * 50)
    for line in (needle(made, tmp_path / "out"), ["generate", "-m", made, "-p", PROMPT]):
        assert "use --no-chat" in sentence(command(*line))
    assert not (tmp_path / "out").exists()
    assert command(*needle(made, tmp_path / "out", "--no-chat"))[0] == 0


def test_chat_without_a_template(folder: Any, command: Any, tmp_path: Path) -> None:
    made = folder()
    (made / "prose.txt").write_text("The grass is green. " * 50)
    assert "no chat template" in sentence(command(*needle(made, tmp_path / "out", "--chat")))
    assert command(*needle(made, tmp_path / "out", "--no-chat"))[0] == 0
    assert "chat" not in json.loads((tmp_path / "out" / "config.json").read_text())


# --- loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 256}, "[128, 128] in the weights and [256, 128] by the config (and 1 more)"),
        ({"intermediate_size": 200}, "mlp.down_proj.weight is [128, 192] in the weights and [128, 200] by"),
        ({"num_key_value_heads": 4}, "k_proj.weight is [32, 128] in the weights and [64, 128] by the config"),
        ({"num_hidden_layers": 3}, "there is no model.layers.2.input_layernorm.weight in the weights (and 8"),
        ({"pad_token_id": 128}, "Could not load a causal language model from"),
        ({"hidden_size": "wide"}, "Could not load a causal language model from"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(
    folder: Any, command: Any, config: dict[str, Any], said: str
) -> None:
    made = folder(config=config)
    assert said in sentence(command("generate", "-m", made, "-p", PROMPT))


def test_a_folder_without_a_tokenizer(folder: Any, command: Any) -> None:
    made = folder()
    for file in made.glob("*token*"):
        file.unlink()
    said = sentence(command("generate", "-m", made, "-p", PROMPT))
    assert f"Could not load a causal language model from {made}: its tokenizer cannot be read (" in said
    assert said.endswith("or copy the tokenizer's files, such as tokenizer.json.")


# --- positions -------------------------------------------------------------------------------------------


def test_stretching_is_advised_where_it_can_be_done(tiny_llama: Any) -> None:
    learned = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=1, n_head=2, vocab_size=128))
    stretched = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    stretched["original_max_position_embeddings"] = 32
    cases = (
        (
            tiny_llama(max_position_embeddings=64),
            "64 positions and does not understand later tokens: stretch them",
        ),
        (
            tiny_llama(max_position_embeddings=64, rope_parameters=stretched),
            "later tokens: shorten the text.",
        ),
        (learned, "64 positions and cannot read later tokens: shorten the text."),
    )
    for model, said in cases:
        check_length(model, 64)
        with pytest.raises(FarspanError) as error:
            check_length(model, 65)
        assert said in str(error.value) and ("yarn" in str(error.value)) == ("stretch them" in said)


def test_an_answer_past_learned_positions_is_refused_before_it_begins(command: Any, tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=1, n_head=2, vocab_size=128))
    model.save_pretrained(tmp_path / "gpt2")
    letters().save_pretrained(tmp_path / "gpt2")
    line = ["generate", "-m", tmp_path / "gpt2", "-p", PROMPT, "--max-new-tokens"]
    said = sentence(command(*line, 64 - len(PROMPT) + 1))
    assert "with its answer (--max-new-tokens 35) has 65 tokens, but gpt2 has 64 positions" in said
    assert "yarn" not in said
    assert "shorten the text" in sentence(command(*line, 64, "--beyond-positions"))
    code, _, err = command(*line, 64 - len(PROMPT))
    assert code == 0, err


def test_the_whole_folder_loads(whole: Path) -> None:
    """Without the changes of the other tests nothing is refused, and nothing is said."""
    model, tokenizer = load(whole)
    assert model.config.vocab_size == 128 and tokenizer.pad_token_id == 0
