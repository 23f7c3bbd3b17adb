"""Tiny GGUF files of random weights, written with gguf's own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

LAYERS, HIDDEN = 2, 64
END, STOP = "<|endoftext|>", "<|im_end|>"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"


def byte_alphabet() -> list[str]:
    """The 256 characters in which a byte-level vocabulary spells bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [spelling[byte] for byte in range(256)]


TOKENS = [*byte_alphabet(), "th", "the", "12", END, STOP, *(f"<unused{i}>" for i in range(59))]
MERGES = ["t h", "th e", "1 2"]


def tiny_model(seed: int = 0) -> Any:
    """A random fp32 Qwen2 of two layers."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).eval()


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """The model's weights by llama.cpp's names."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    found = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def write_gguf(
    path: Path,
    model: Any,
    *,
    architecture: str = "qwen2",
    pre: str = "qwen2",
    quantised: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
    rope_scaling: str | None = None,
    add_bos: bool = False,
) -> Path:
    """A GGUF of the model: float32, the tensors whose names hold one of `quantised` as Q8_0."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope_scaling:
        writer.add_string(f"{architecture}.rope.scaling.type", rope_scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in (END, STOP) else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(TOKENS.index(STOP))
    writer.add_pad_token_id(TOKENS.index(END))
    writer.add_bos_token_id(TOKENS.index(END))
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors(model).items():
        if any(part in name for part in without):
            continue
        if any(part in name for part in quantised):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
