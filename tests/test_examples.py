"""The scripts of examples/ run as they stand, and the method in one of them reads what it says it reads."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan
from farspan.attention import method as registry
from farspan.attention.attend import attend
from farspan.attention.keys import Keys
from farspan.attention.kv import KV
from farspan.attention.method import DECODE
from farspan.attention.softmax import Softmax

from .parallel.launch import ranks

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(smollm2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """example(name): the names of a script, whose `farspan.load` gives the tests' model."""
    monkeypatch.setattr(farspan, "load", lambda _: smollm2)
    before = set(farspan.methods())
    yield lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))
    for name in set(registry._REGISTRY) - before:
        del registry._REGISTRY[name]


def test_own_task(example: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    example("own_task")["main"]("smollm2", str(tmp_path / "out"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "dense",
        "window:w=64,sinks=4",
    ]
    rows = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(rows) == 4 and (tmp_path / "out" / "marked.md").exists()


def test_patch_a_model(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example("patch_a_model")["main"]()
    printed = capsys.readouterr().out
    assert "sparse:  4711" in printed
    assert "the model is as it was: True" in printed


def test_own_method_is_reported(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example("own_method")["main"]()
    assert "by_norm:k=128" in capsys.readouterr().out


@pytest.mark.parametrize("starts", [[0, 0, 0], [0, 7, 55]])
def test_own_method_reads_the_keys_it_names(example: Any, starts: list[int]) -> None:
    method = example("own_method")["ByNorm"](k=8, local=4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 60, 16, generator=generator).double() for heads in (4, 2, 2))
    keys = Keys(kv=KV(k, v), tq=2, softmax=Softmax(0.25), start=torch.tensor(starts) if any(starts) else None)
    got, reads = attend(method, DECODE, q[:, :, -2:], keys)
    pairs = 0
    for b, first in enumerate(starts):
        for t in (58, 59):
            for head in range(4):
                norms = k[b, head // 2].norm(dim=-1)
                earlier = range(first, max(first, t + 1 - 4))
                read = sorted(earlier, key=lambda i: float(norms[i]))[:8] + list(
                    range(max(first, t - 3), t + 1)
                )
                pairs += len(read)
                weights = torch.softmax(k[b, head // 2, read] @ q[b, head, t] * 0.25, 0)
                want = weights @ v[b, head // 2, read]
                torch.testing.assert_close(got.out[b, head, t - 58], want)
    assert reads.pairs == pairs


def test_calibrate_keeps_its_recipe(
    example: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = example("calibrate")["main"]
    script("smollm2-135m", str(tmp_path / "recipe"))
    first = capsys.readouterr().out
    monkeypatch.setattr(farspan, "calibrate", None)  # the second run has no need of it
    script("smollm2-135m", str(tmp_path / "recipe"))
    assert "double_sparsity:k=128" in first
    assert capsys.readouterr().out == first


def test_two_ranks(tiny_folder: Path) -> None:
    first, second = ranks(2, str(EXAMPLES / "two_ranks.py"), str(tiny_folder), within=120)
    assert first.code == second.code == 0, first.err
    assert "over ranks: this one sent" in first.out
    assert second.out == ""
