"""What is tuned, and how often: once for each class of lengths."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from farspan.attention.kv import KV
from farspan.attention.ops.decode import decode
from farspan.attention.ops.flash import flash
from farspan.attention.softmax import Softmax

from .tools import make_qkv

triton = pytest.importorskip("triton")  # before what imports it
launch = import_module("farspan.attention.ops.launch")
delta = import_module("farspan.attention.ops.scan.kernels.delta")
backward = import_module("farspan.attention.ops.block_sparse.backward")
block_sparse_triton, decode_triton, flash_triton, gather_decode_triton = (
    import_module(f"farspan.attention.ops.{op}.triton")
    for op in ("block_sparse", "decode", "flash", "gather_decode")
)


def test_classes_of_lengths() -> None:
    borders = {0: 0, 1: 0, 64: 0, 1024: 0, 1025: 1, 4096: 1, 4097: 2, 16384: 2, 65536: 3, 131072: 4, 2**20: 5}
    assert {length: launch.bucket(length) for length in borders} == borders


def test_every_kernel_whose_work_grows_with_the_keys_has_the_class_in_its_key() -> None:
    kernels = [
        decode_triton._decode,
        gather_decode_triton._gather_decode,
        delta._half,
        delta._widest,
        delta._single,
    ]
    for choose in (
        flash_triton._kernel,
        block_sparse_triton._run_forward,
        backward._run_backward_q,
        backward._run_backward_kv,
    ):
        kernels += [choose(torch.float16, 64), choose(torch.float16, 64, 128), choose(torch.float16, 256)]
    for kernel in kernels:
        assert "bucket" in kernel.key and "bucket" in kernel.timed.keys


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tuning keys for which configurations were timed, in order: kernels are tuned as on a GPU, with
    times that depend on nothing."""
    keys: list[Any] = []

    def from_disk(self: Any, key: Any, configs: Any, benchmark: Any) -> bool:
        """What is kept on disk is kept for this key."""
        keys.append(key)
        benchmark()
        return False

    autotuner = triton.runtime.autotuner.Autotuner
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "cannot_launch", lambda device: [])
    monkeypatch.delenv("FARSPAN_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotuner, "_bench", lambda self, *args, config, **meta: [1.0, 1.0, 1.0])
    monkeypatch.setattr(autotuner, "check_disk_cache", from_disk)
    for kernel in (decode_triton._decode, flash_triton._kernel(torch.float16, 16)):
        monkeypatch.setattr(kernel.timed, "cache_results", True)
        monkeypatch.setattr(kernel.timed, "cache", {})
    return keys


def test_a_warm_up_does_not_decide_for_long_prompts(timed: list[Any]) -> None:
    """And the key under which a choice is kept on disk tells them apart."""
    for tokens in (16, 40, 1030, 1100, 20):
        q, k, v = make_qkv(1, 1, 1, 16, tokens, 16, dtype=torch.float16)
        flash(q, KV(k, v), Softmax(0.25), impl="triton")
    assert len(timed) == len(set(timed)) == 2


def test_a_generation_is_tuned_once_in_a_class_of_lengths(
    timed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_triton, "number_of_splits", lambda *_: 1)
    q, k, v = make_qkv(1, 1, 1, 1, 1100, 16, dtype=torch.float16)
    for tokens in (60, 400, 1023, 1024, 1025, 1026, 1100, 1000):
        decode(q, KV(k[:, :, :tokens], v[:, :, :tokens]), Softmax(0.25), impl="triton")
    assert len(timed) == len(set(timed)) == 2
