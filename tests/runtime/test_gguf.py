"""A local GGUF file as a model: what it is converted to, and the sentence each bad file ends in."""

from __future__ import annotations

from types import SimpleNamespace

import gguf
import pytest
import torch
from small_gguf import END, STOP, TOKENS, tensors, tiny_model, write_gguf

import farspan
from farspan import FarspanError
from farspan.cli import main
from farspan.runtime.models import encode_prompt, fetch, load, resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FARSPAN_CACHE", str(folder))
    return folder


def assert_refused(path, cache, *sentences: str) -> None:
    """One sentence for the file, and nothing left in the cache."""
    with pytest.raises(FarspanError) as error:
        load(path)
    for sentence in sentences:
        assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    left = [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert not left


def test_weights_and_logits_are_the_files(tmp_path, cache):
    """The oracles: the float32 weights that were written, gguf's own dequantiser, and the model itself."""
    saved = tiny_model()
    path = write_gguf(tmp_path / "tiny.gguf", saved, quantised=("ffn_down", "attn_q.weight"))
    model, tokenizer = farspan.load(path, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and tokenizer.model_max_length == 512
    kind = gguf.GGMLQuantizationType.Q8_0
    written, read = tensors(saved), tensors(model)
    for name, exact in written.items():
        if "ffn_down" in name or "attn_q.weight" in name:
            exact = torch.from_numpy(gguf.dequantize(gguf.quantize(exact.numpy(), kind), kind))
        assert torch.equal(read[name], exact.to(torch.bfloat16)), name
    saved.load_state_dict(model.float().state_dict())
    ids = torch.arange(40)[None] * 5 % len(TOKENS)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, saved(ids).logits)


def test_tokenizer_is_the_files(tmp_path, cache):
    _, tokenizer = load(write_gguf(tmp_path / "tiny.gguf", tiny_model()))
    # Qwen2 takes each digit alone (so "12" is never merged) and composes accents (NFC).
    assert tokenizer.tokenize("the 12") == ["the", "Ġ", "1", "2"]
    assert tokenizer("cafe\u0301")["input_ids"] == tokenizer("caf\u00e9")["input_ids"]
    for text in ("the naïve 你好 \n\n\t😀", "a  b   c "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == (STOP, END)
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")[0]) == "<user>hi<answer>"
    assert tokenizer.tokenize(f"the{STOP}") == ["the", STOP]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["the", "Ġ", "1", "2"]),  # each digit alone, before GPT-2's splitting
        ("gpt-2", ["the", "Ġ", "12"]),  # nothing but GPT-2's splitting
    ],
)
def test_each_file_is_split_in_its_own_way(tmp_path, cache, pre, expected):
    _, tokenizer = load(write_gguf(tmp_path / "tiny.gguf", tiny_model(), pre=pre))
    assert tokenizer.tokenize("the 12") == expected


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_added_where_the_file_says_so(tmp_path, cache, add_bos):
    """transformers 5.21 leaves it out."""
    _, tokenizer = load(write_gguf(tmp_path / "tiny.gguf", tiny_model(), add_bos=add_bos))
    begin = [TOKENS.index(END)] if add_bos else []
    assert tokenizer("the")["input_ids"] == [*begin, TOKENS.index("the")]


def test_unknown_splitting_is_said(tmp_path, cache):
    with pytest.warns(UserWarning, match="splits text by the rule 'chatglm-bpe'"):
        load(write_gguf(tmp_path / "tiny.gguf", tiny_model(), pre="chatglm-bpe"))


def test_what_lies_beside_the_file_is_not_read(tmp_path, cache):
    """A tokenizer, an adapter, a config of another model in the same folder, whose name has a space."""
    folder = tmp_path / "my models"
    folder.mkdir()
    saved = tiny_model()
    path = write_gguf(folder / "tiny model.gguf", saved)
    for name in ("tokenizer.json", "adapter_config.json", "config.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    model, tokenizer = load(path, dtype="bfloat16")
    read = tensors(model)
    assert all(torch.equal(read[name], exact.to(torch.bfloat16)) for name, exact in tensors(saved).items())
    assert tokenizer("hello")["input_ids"]


def test_converted_once_by_content(tmp_path, cache, monkeypatch):
    first = write_gguf(tmp_path / "a.gguf", tiny_model())
    folder = resolve(first)
    monkeypatch.setattr(fetch, "convert", lambda *_: pytest.fail("converted again"))
    assert resolve(str(first)) == folder and folder.is_relative_to(cache)
    monkeypatch.undo()
    monkeypatch.setenv("FARSPAN_CACHE", str(cache))
    other = tiny_model(seed=1)
    write_gguf(first, other)  # another model under the same path
    read = tensors(load(first)[0])["output.weight"]
    assert torch.equal(read, other.lm_head.weight.to(torch.bfloat16))
    assert not list(cache.rglob("*.partial"))


def test_command_line_takes_a_file(tmp_path, cache, capsys):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--model", str(path), "--prompt", "the the", "--max-new-tokens", "3", "--json"])
    assert not ended.value.code and '"new_tokens": 3' in capsys.readouterr().out


# --- bad files -----------------------------------------------------------------------------------


def test_not_a_gguf(tmp_path, cache):
    (tmp_path / "notes.gguf").write_text("notes")
    assert_refused(tmp_path / "notes.gguf", cache, "is not a GGUF file; give a GGUF file")
    (tmp_path / "empty").write_bytes(b"")
    assert_refused(tmp_path / "empty", cache, "is not a GGUF file")
    assert_refused("nowhere.gguf", cache, "There is no folder or file 'nowhere.gguf'")


@pytest.mark.parametrize("kept", [9, 200, 6000, -500])
def test_cut_off_gguf(tmp_path, cache, kept):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(path, cache, "is a damaged GGUF file", "download it again")


def test_architecture_that_transformers_cannot_read(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), architecture="wavenet")
    assert_refused(path, cache, "transformers cannot read", "(a GGUF of architecture 'wavenet')")


def test_weights_that_are_not_in_the_file(tmp_path, cache):
    """transformers would fill them with random numbers, as it does for the first file of a split model."""
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), without=("blk.1.ffn_up", "blk.1.attn_k.weight"))
    assert_refused(path, cache, "lacks 2 weights, such as model.layers.1.mlp.up_proj.weight")


def test_stretched_positions_that_the_reader_drops(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), rope_scaling="yarn")
    assert_refused(path, cache, "has stretched rotary positions, which transformers' reader does not read")


def test_no_space(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model())
    assert_refused(path, cache, "the disk is full", "1 MB are free")
