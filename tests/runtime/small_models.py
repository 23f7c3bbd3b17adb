"""Tiny random models of every architecture that is served, and what the runtime's tests measure on them."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers as hf
from torch import Tensor

import farspan
from farspan.runtime.hf import returned_cache, with_cache

VOCAB, PAD, BOS, EOS = 128, 0, 1, 2
WINDOW = 16  # of the models that have sliding layers: prompts in these tests are longer

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide enough that attention is far from flat, so that methods and bugs show
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
UNTIED = {"tie_word_embeddings": False}  # tied, a random model repeats its last token for ever
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _alternating(**more: Any) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": WINDOW, **more}


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2",
        _alternating(
            attn_logit_softcapping=4.0, final_logit_softcapping=10.0, query_pre_attn_scalar=16, **UNTIED
        ),
    ),
    "gemma3": ("Gemma3", _alternating(query_pre_attn_scalar=16, **UNTIED)),
    "phi3": ("Phi3", {"original_max_position_embeddings": 512}),
    "olmo2": ("Olmo2", {}),
    "gpt_oss": ("GptOss", _alternating(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "qwen3_next": (
        "Qwen3Next",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "falcon_h1": (
        "FalconH1",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "mlp", "full_attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "time_step_min": 1e-6,  # time steps are clamped to it in calls of several tokens only
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
}
MORE_HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {  # a trial accepts them; test_hybrids.py runs them
    "bamba": (
        "Bamba",
        {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_chunk_size": 16,
        },
    ),
    "olmo_hybrid": (
        "OlmoHybrid",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"], **UNTIED}),
}
ALL_SLIDING = ("mistral",)
RECURRENT = ("qwen3_next", "falcon_h1", "nemotron_h", "granitemoehybrid")


def make(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A fresh random fp32 model in eval mode; its learned sinks are random too."""
    family, settings = (ARCHITECTURES | MORE_HYBRIDS)[name]
    prefix = f"{family}Text" if family == "Gemma3" else family
    config = getattr(hf, f"{prefix}Config")(**{**COMMON, **settings, **overrides})
    torch.manual_seed(seed)
    model = getattr(hf, f"{family}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


@functools.cache
def shared(name: str) -> Any:
    """The same, made once per process. Tests leave it unpatched."""
    return make(name)


def prompt(batch: int = 1, length: int = 40, seed: int = 0) -> Tensor:
    """Random token ids [batch, length], none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: tuple[int, ...] = (41, 29, 40), seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch: input_ids and attention_mask [len(lengths), max(lengths)]."""
    longest = max(lengths)
    ids, mask = torch.full((2, len(lengths), longest), PAD)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompt(1, length, seed + row)[0]
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def decode(model: Any, inputs: Tensor | dict[str, Tensor], new: int = 12, **how: Any) -> Tensor:
    """generate() of exactly ``new`` tokens, greedy unless told otherwise -> the new tokens [rows, new]."""
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **how}
    out = model.generate(**inputs, max_new_tokens=new, **how)
    out = out if isinstance(out, Tensor) else out.sequences
    return out[:, inputs["input_ids"].shape[1] :]


def logits(model: Any, inputs: Tensor | dict[str, Tensor], **how: Any) -> Tensor:
    """Logits [batch, T, V] of one plain call, without gradients."""
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    with torch.no_grad():
        return model(**inputs, **how).logits


class Feed:
    """Tokens of a padded batch, given to a model call by call on one cache."""

    def __init__(self, model: Any, ids: Tensor, mask: Tensor) -> None:
        self.model, self.ids, self.mask, self.cache, self.length = model, ids, mask, None, 0

    def __call__(self, count: int) -> Tensor:
        end = self.length + count
        mask = self.mask[:, :end]
        how = with_cache(self.model, self.cache)
        with torch.no_grad():
            output = self.model(
                self.ids[:, self.length : end],
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, self.length :],
                use_cache=True,
                **how,
            )
        self.cache, self.length = returned_cache(output), end
        return output.logits


def close(a: Tensor, b: Tensor, mask: Tensor | None = None) -> bool:
    """Equal within fp32 rounding of a few layers; positions that ``mask`` [batch, T] zeroes are left out."""
    wrong = (a - b).abs().amax(-1)
    wrong = wrong if mask is None else wrong[mask.bool()]
    return bool(wrong.max() <= 2e-5 * b.abs().max())


@functools.cache
def recipe(name: str, by: str = "qk") -> Any:
    """Double Sparsity's calibration of ``shared(name)``."""
    return farspan.calibrate(shared(name), tokens, "any", by=by, tokens=96, window=64)


def tokens(text: str, **_: Any) -> dict[str, Tensor]:
    """Stands for a tokenizer: the same 96 tokens for every text."""
    return {"input_ids": prompt(1, 96, seed=len(text))}


def snapshot(model: Any) -> dict[str, Any]:
    """Everything a patch may touch, so that two snapshots are equal exactly where the model is unchanged."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if not isinstance(v, dict)}
        hooks = {k: list(v.items()) for k, v in vars(module).items() if k.endswith("hooks") and v}
        seen[name] = (type(module), {k: id(v) for k, v in own.items()}, hooks)
    configs = [m.config for m in model.modules() if "config" in vars(m)]
    seen["configs"] = [(id(c), copy.deepcopy(c.to_dict()), c._attn_implementation) for c in configs]
    seen["weights"] = [(name, id(p), p._version) for name, p in model.named_parameters()]
    return seen


def served(model: Any) -> list[int]:
    """Layers with full attention: those a method serves."""
    return [i for i, kind in enumerate(layer_kinds(model)) if kind in ("full_attention", "hybrid")]


def layer_kinds(model: Any) -> list[str]:
    config = model.config.get_text_config()
    default = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return list(getattr(config, "layer_types", None) or [default] * config.num_hidden_layers)
