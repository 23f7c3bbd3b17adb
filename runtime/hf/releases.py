"""Releases of transformers: which ones farspan is tested with, and with which models."""

from __future__ import annotations

import transformers

TESTED = ("5.21", "5.22", "5.23", "5.24")  # newest last

# Classes of transformers that the tests patch and compare with the unpatched model, each in every phase.
ARCHITECTURES = frozenset(
    {
        "FalconH1ForCausalLM",
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "GptOssForCausalLM",
        "LlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "MistralForCausalLM",
        "OPTForCausalLM",
        "Olmo2ForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3NextForCausalLM",
    }
)


def installed() -> str:
    """The release of transformers that is installed."""
    return transformers.__version__


def newer_than_tested() -> bool:
    """Whether the installed release is newer than every tested one."""
    return _minor(installed()) > _minor(TESTED[-1])


def wanted() -> str:
    """What pip is asked for to get a tested release."""
    major, minor = _minor(TESTED[-1])
    return f"transformers>={TESTED[0]},<{major}.{minor + 1}"


def is_tested(kind: type) -> bool:
    """Whether the tests cover a class of models: transformers' own, not another author's of that name."""
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in ARCHITECTURES


def _minor(release: str) -> tuple[int, int]:
    major, minor, *_ = release.split(".")
    return int(major), int(minor)
