"""`farspan plan` on the command line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config
from typer.testing import CliRunner

from farspan.cli.app import app
from farspan.parallel.mechanisms.volume import (
    Geometry,
    PrefillCall,
    decode_volume,
    volumes,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    """A model's config, and not a single weight."""
    path, config = tmp_path_factory.mktemp("plan") / "config-only", tiny_llama().config
    config.dtype = "float32"
    config.save_pretrained(path)
    return path


def invoke(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "100"}).invoke(app, ["plan", *arguments])


def as_json(*arguments: str) -> Any:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_command_reads_the_config_alone(folder: Path, tiny_llama: Any):
    found = as_json("--model", str(folder), "--length", "4K", "--gpus", "2", "--gpu-memory", "1G")
    model = tiny_llama()
    assert found["memory"]["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert found["memory"]["kv_cache"] == 2 * 2048 * 2 * 2 * 16 * 4
    assert found["fits"] and found["ranks"] == 2
    geometry = Geometry(8, 2, 16, 4)
    assert found["bytes_sent_per_rank"]["prefill_by_mechanism"] == {
        name: 2 * size for name, size in volumes(geometry, PrefillCall(2, 4096)).items()
    }
    assert found["bytes_sent_per_rank"]["decode_per_token"] == 2 * decode_volume(geometry, 2)


def test_command_on_the_alias(smollm2: Any):
    found = as_json("--length", "128K", "--gpus", "3", "--gpu", "h200", "--method", "quest:k=512")
    saved = torch.bfloat16.itemsize  # the plan is for a GPU; a CPU may have loaded another dtype
    assert found["memory"]["weights"] == sum(p.numel() * saved for p in smollm2[0].parameters())
    assert found["device"] == {"name": "H200", "memory": 141 << 30}
    assert found["method"]["decode"].startswith("quest")


def test_command_prints_what_does_not_fit(folder: Path):
    done = invoke("--model", str(folder), "--length", "1M", "--gpus", "2", "--gpu-memory", "128M")
    assert done.exit_code == 0 and "It does not fit: a device needs" in done.output
    assert "memory of each GPU" in done.output and "prefill by gather" in done.output
    assert max(map(len, done.output.split("Mechanism:")[0].splitlines())) <= 100
    done = invoke("--model", str(folder), "--length", "4K", "--gpus", "2")
    assert "It fits into the memory; so would" in done.output and "positions" not in done.output


def test_command_says_that_the_prompt_is_beyond_the_positions(folder: Path, tmp_path: Path):
    """4,096 positions: 4K tokens have a place, 16K do not, and the memory has nothing to do with it."""
    ask = ["--model", str(folder), "--gpus", "2"]
    note = (
        "config-only has 4096 positions, and 16384 tokens are more: it does not understand later tokens; "
        "stretch them"
    )
    [found] = as_json(*ask, "--length", "16K")["notes"]
    assert note in found and found.endswith("--rope yarn:4 where you run it.")
    assert (
        as_json(*ask, "--length", "4K")["notes"] == []
        and as_json(*ask, "--length", "4K")["positions"] == 4096
    )
    assert as_json(*ask, "--length", "2M")["notes"][0].endswith("--rope yarn:2097152 where you run it.")
    config = GPT2Config(vocab_size=128, n_positions=256, n_embd=64, n_layer=2, n_head=4)
    config.save_pretrained(tmp_path / "gpt2")
    [found] = as_json("--model", str(tmp_path / "gpt2"), "--gpus", "2", "--length", "1K")["notes"]
    assert "gpt2 has 256 positions" in found and "cannot be stretched" in found and "yarn" not in found


@pytest.mark.parametrize(
    "arguments",
    [
        ["--length", "1T", "--gpus", "8"],
        ["--length", "1M", "--gpus", "4096"],
        ["--length", "64M", "--gpus", "128", "--prefill-chunk", "4K"],
        ["--length", "4K", "--gpus", "8", "--gpu-memory", "1000000T", "--batch-size", "1T"],
    ],
    ids=" ".join,
)
def test_large_numbers_are_answered_quickly(folder: Path, arguments: list[str]):
    began = time.perf_counter()
    found = as_json("--model", str(folder), *arguments)
    assert time.perf_counter() - began < 60
    assert found["fits"] is (found["memory"]["needed"] <= found["device"]["memory"])
    assert math.isfinite(found["seconds"]["prefill"]) and found["seconds"]["prefill"] > 0


def test_simulate_writes_and_prints(folder: Path, tmp_path: Path):
    out = tmp_path / "new" / "simulated"
    ask = ["--model", str(folder), "--length", "1M", "--gpus", "4", "--simulate", "--ranks", "1,2,8,64"]
    done = invoke(*ask, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "Strong scaling: 1048576 tokens" in done.output and "Weak scaling: 262144 tokens" in done.output
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "scaling.json").read_text())
    assert {row["ranks"] for row in saved["rows"]} == {1, 2, 8, 64}
    assert as_json(*ask)["rows"] == saved["rows"]
