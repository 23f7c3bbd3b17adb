"""`farspan train` as users start it: over two ranks, killed and started again, and on a bad folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan import Recipe

from . import launch
from .test_cli_ranks import TEXT, torchrun

STEPS = 6
TRAIN = ["train", "seer:block=16,gate_dim=8", "--steps", str(STEPS), "--window", "128", "--batch", "2"]
TRAIN += ["--held-out", "2", "--save-every", "1", "--lr", "0.01"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any, tiny_llama: Any, smollm2: Any) -> tuple[list[str], Recipe, str]:
    """The arguments of a training, its recipe in one process, and what the command printed."""
    folder = tmp_path_factory.mktemp("train")
    tiny_llama(vocab_size=49152, max_position_embeddings=2048).save_pretrained(folder / "tiny")
    smollm2[1].save_pretrained(folder / "tiny")
    (folder / "prose.txt").write_text(TEXT)
    arguments = [*TRAIN, "--model", str(folder / "tiny"), "--text", str(folder / "prose.txt")]
    alone = launch.here([*arguments, "--out", str(folder / "alone")])
    assert alone.code == 0, alone
    return arguments, Recipe.load(folder / "alone"), alone.out


def test_two_ranks_learn_what_one_process_learns(trained: Any, tmp_path: Path) -> None:
    arguments, alone, printed = trained
    [spread] = launch.commands([*torchrun(), "-m", "farspan", *arguments, "--out", str(tmp_path)])
    assert spread.code == 0, spread
    both = Recipe.load(tmp_path)
    assert both.settings["processes"] == 2 and alone.settings["processes"] == 1
    for name, x in alone.tensors.items():  # the same windows; a mean over two processes rounds otherwise
        assert torch.allclose(x, both.tensors[name], atol=2e-5), name
    assert spread.out == printed and spread.err.count("Saved the recipe") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))


def test_a_killed_training_ends_at_the_same_weights(trained: Any, tmp_path: Path) -> None:
    arguments, alone, _ = trained
    command = [*arguments, "--out", str(tmp_path)]
    begun = [sys.executable, "-m", "farspan", *command]
    process = subprocess.Popen(begun, env=launch.environment(), stderr=subprocess.DEVNULL)
    log, began = tmp_path / "log.jsonl", time.monotonic()
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert time.monotonic() - began < 120 and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "recipe.json").exists()
    again = launch.here(command)
    assert again.code == 0, again
    resumed = Recipe.load(tmp_path)
    assert all(torch.equal(x, resumed.tensors[name]) for name, x in alone.tensors.items())
