"""The differences between the releases of transformers that farspan supports, and the tested releases.

| since | what changed | used by |
|---|---|---|
| 5.22 | the cache has a `DummyLayer` for a layer that caches nothing | `cache.adopt_cache`, by its name |
| 5.23 | layers of type "mlp" and "moe" have the type "dummy" for a cache | `models.inspect_model` |
| 5.24 | `forward` takes `cache=`; `past_key_values=` still works there, with a FutureWarning | `cache_name` |
| 5.24 | outputs carry `.cache`; `.past_key_values` reads it | `returned_cache` |
| 5.24 | `Cache.update` passes the attention's keyword arguments on to the layer | `KVStoreLayer.update` |
| 5.24 | cache layers no longer have a `dtype` | nothing; farspan's cache layers never read it |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

TESTED = ("5.21", "5.22", "5.23", "5.24")
"""Releases (major.minor, oldest first) on which the tests passed; tests/releases.py reads it."""

# Model classes of transformers that the tests patch and compare with the unpatched model, in every phase.
ARCHITECTURES = frozenset(
    {
        "FalconH1ForCausalLM",
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "GptOssForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "LlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "MistralForCausalLM",
        "NemotronHForCausalLM",
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

CACHE_NAMES = ("cache", "past_key_values")
"""The names that a forward may have for its cache, the newer one first. Where both are given, the newer one
applies."""


def installed() -> str:
    """The version of the installed transformers, such as "5.24.0"."""
    return version("transformers")


def newer_than_tested(release: str | None = None) -> bool:
    """Whether a release (default: the installed one) is newer than any that the tests ran on."""
    return _minor(release or installed()) > _minor(TESTED[-1])


def tested_requirement() -> str:
    """The requirement by which pip installs a tested release of transformers."""
    major, minor = _minor(TESTED[-1])
    return f"transformers>={TESTED[0]},<{major}.{minor + 1}"


def is_tested(kind: type) -> bool:
    """Whether the tests cover a model class. It must be transformers' own class, not one of the same name."""
    return kind.__module__.startswith("transformers.models.") and kind.__name__ in ARCHITECTURES


def _minor(release: str) -> tuple[int, int]:
    major, minor = release.split(".")[:2]
    return int(major), int(minor)


def cache_name(module: Any) -> str:
    """The name of the cache argument of the forward of a model or decoder."""
    return _cache_name(type(module).forward)


@cache
def _cache_name(forward: Callable[..., Any]) -> str:
    names = inspect.signature(forward).parameters
    usual = CACHE_NAMES[0] if _minor(installed()) >= (5, 24) else CACHE_NAMES[1]
    return next((name for name in CACHE_NAMES if name in names), usual)


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache in the keyword arguments of a call, under either name; None without one."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache(module: Any, past: Any) -> dict[str, Any]:
    """Keyword arguments that pass the cache ``past`` to a model, its decoder or its ``generate``."""
    return {cache_name(module): past}


def returned_cache(output: Any) -> Any:
    """The cache in the output of a model's call or of ``generate``; None without one."""
    found = (getattr(output, name, None) for name in CACHE_NAMES)
    return next((past for past in found if past is not None), None)
