"""Fine-tuning with accelerate, sequences spread over two ranks: the weights become those of one process."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import farspan

from ..runtime import small_models
from . import launch
from .script_accelerate import RATE, RUNS, load, train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
ACCELERATE += [
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
SCRIPT = str(launch.HERE / "script_accelerate.py")


def run(launcher: list[str], port: str, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the ranks have found, and the batch."""
    small_models.make("llama").save_pretrained(folder / "model")
    ids = torch.randint(3, small_models.VOCAB, (2, 93), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    torch.save(batch, folder / "batch.pt")
    [end] = launch.commands([*launcher, port, str(launch.free_port()), SCRIPT, str(folder)], within=120)
    assert end.code == 0, end.err
    return torch.load(folder / "found.pt"), batch


def assert_weights(folder: Path, batch: dict[str, torch.Tensor], found: dict[str, Any]) -> None:
    wanted: dict[str, dict[str, torch.Tensor]] = {}
    for name, (_, spec, _) in RUNS.items():
        if spec not in wanted:
            model = load(folder)
            with farspan.patch(model, spec):
                train(model, torch.optim.SGD(model.parameters(), lr=RATE), torch.Tensor.backward, batch)
            wanted[spec] = model.state_dict()
        for key, weight in wanted[spec].items():
            assert (found[name][key] - weight).abs().max() < 1e-9, f"{name}: {key}"


def test_torchrun(tmp_path: Path):
    found, batch = run(TORCHRUN, "--master-port", tmp_path)
    assert_weights(tmp_path, batch, found)
    # The ranks have compared the order in which theirs and ours began: here, they were interleaved indeed.
    assert re.search(r"farspan \w+_backward (gradients \d+ )+farspan \w+_backward", " ".join(found["order"]))
    said = found["said"]
    assert "pass the LlamaForCausalLM in it: its .module, or accelerator.unwrap_model(...)" in said["wrapped"]
    assert "leave cp_size out of the Accelerator's ParallelismConfig" in said["own context parallelism"]
    assert "the input on rank 1" in said["other batches"]
    assert said["the same batches"] == "nothing"


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path):
    found, batch = run(ACCELERATE, "--main_process_port", tmp_path)
    assert_weights(tmp_path, batch, found)
