"""Training of one model of MQAR, which goes on from its last epoch after a stop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ...attention.errors import FarspanError
from ...runtime.training.checkpoint import load_checkpoint, save_checkpoint
from .data import Examples
from .model import Model
from .settings import Setting

SOLVED, ENDED, DIVERGED = "solved", "epochs", "not finite"
REST = 5  # settings besides the shortest have a fifth of its sequences, as published (2402.18668)
_APART = 100_000  # seeds of data are this far apart, so that the epochs of two runs never meet


@dataclass(frozen=True, kw_only=True)
class Training:
    """What all runs of a folder share.

    first: the first layer of models whose mixer is not A+B; "same": the mixer itself. By default a
    convolution of 3 tokens, as in Based's comparison (2402.18668), with which attention needs no positions
    and finds the token before a value in few steps. samples: sequences of an epoch; where a model is trained
    on several settings, as many of the shortest and a fifth of each other one. same_data: every epoch has the
    same ones, as published; otherwise each epoch draws its own. test_samples: sequences of each setting that
    are never trained on. batch_tokens: tokens of a step, as many whole sequences as they hold. stop: the
    accuracy in every setting that ends a run. Weights are decayed by
    ``weight_decay``, and the learning rate falls to 0 by a cosine over all steps.

    Raises FarspanError for numbers out of range.
    """

    vocabulary: int = 8192
    filler: str = "zero"
    heads: int = 1
    first: str = "base_conv:length=3"
    samples: int = 8192
    same_data: bool = False
    test_samples: int = 500
    epochs: int = 8
    batch_tokens: int = 4096
    dropout: float = 0.0
    weight_decay: float = 0.1
    stop: float = 0.99

    def __post_init__(self) -> None:
        for name in ("samples", "test_samples", "epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                raise FarspanError(f"{name} is at least 1; got {getattr(self, name)}.")
        for name in ("dropout", "stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise FarspanError(f"{name} is from 0 to 1; got {getattr(self, name)}.")

    def rows(self, setting: Setting) -> int:
        """Sequences of a step."""
        return max(1, self.batch_tokens // setting.length)

    def counts(self, settings: tuple[Setting, ...]) -> list[int]:
        """Sequences of each setting in an epoch."""
        shortest = min(settings)
        return [self.samples if x == shortest else max(1, self.samples // REST) for x in settings]

    def steps(self, settings: tuple[Setting, ...]) -> int:
        """Steps of an epoch."""
        counts = self.counts(settings)
        return sum(math.ceil(n / self.rows(x)) for x, n in zip(settings, counts, strict=True))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a mixer at a size, the settings of its sequences, a learning rate and a seed."""

    mixer: str
    dim: int
    settings: tuple[Setting, ...]
    lr: float
    seed: int

    @property
    def sweep(self) -> tuple[str, str]:
        """What the runs of one sweep of learning rates share."""
        return self.mixer, f"{'+'.join(map(str, self.settings))}/d{self.dim}/seed{self.seed}"

    @property
    def key(self) -> str:
        """Its row's key, which is unique within a mixer."""
        return f"{self.sweep[1]}/lr{self.lr:g}"


def train(
    run: Run,
    training: Training,
    folder: Path,
    *,
    device: str = "cpu",
    progress: Callable[[int, dict[str, float]], None] = lambda epoch, accuracy: None,
) -> dict[str, Any]:
    """Train the model of ``run`` and measure it after each epoch -> the row of the run.

    ``folder`` holds a checkpoint while the run goes on; the result does not depend on where it was stopped.
    progress: called after each epoch with its number, from 1 on, and the accuracy by setting. The row has the
    accuracies after the last epoch, why the run ended, the accuracies of all epochs, and its cost:
    ``seconds`` of wall time and ``cpu_seconds``.
    """
    settings = {**asdict(run), **asdict(training)}
    found = load_checkpoint(folder, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = Model(
            run.mixer,
            dim=run.dim,
            heads=training.heads,
            first=training.first,
            length=max(run.settings).length,
            vocabulary=training.vocabulary,
            dropout=training.dropout,
            encoders=run.settings[0].encoders,
        ).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=training.weight_decay)
        done: dict[str, Any] = {"accuracies": [], "losses": [], "seconds": 0.0, "cpu_seconds": 0.0}
        if found is not None:
            model.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
            done = found["done"]
        tests = {x: _data(run, x, training, 0, training.test_samples, device) for x in run.settings}
        ended = None
        while ended is None:
            epoch, began = len(done["losses"]) + 1, (time.perf_counter(), time.process_time())
            loss = _epoch(model, optimizer, run, training, epoch, device)
            accuracy = {
                str(x): model.accuracy(test, training.rows(x)) if math.isfinite(loss) else 0.0
                for x, test in tests.items()
            }
            done["losses"].append(loss)
            done["accuracies"].append(accuracy)
            done["seconds"] += time.perf_counter() - began[0]
            done["cpu_seconds"] += time.process_time() - began[1]
            ended = _ended(training, done)
            if ended is None:
                states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(folder, {"settings": settings, "step": epoch, "done": done, **states})
            progress(epoch, accuracy)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "accuracy": done["accuracies"][-1],
        "loss": done["losses"][-1],
        "ended": ended,
        "epochs": len(done["losses"]),
        "steps": len(done["losses"]) * training.steps(run.settings),
        "state": {str(x): model.state_bytes(x.length) for x in run.settings},
        "parameters": sum(p.numel() for p in model.parameters()),
        **done,
    }


def _ended(training: Training, done: dict[str, Any]) -> str | None:
    if not math.isfinite(done["losses"][-1]):
        return DIVERGED
    if min(done["accuracies"][-1].values()) >= training.stop:
        return SOLVED
    return ENDED if len(done["losses"]) == training.epochs else None


def _epoch(
    model: Model,
    optimizer: torch.optim.Optimizer,
    run: Run,
    training: Training,
    epoch: int,
    device: str,
) -> float:
    """One epoch -> its mean loss; it ends early where the loss is not finite. The sequences of a step have
    one setting. Everything random follows from the seed and the number of the epoch."""
    number = 1 if training.same_data else epoch
    counts = training.counts(run.settings)
    data = [_data(run, x, training, number, n, device) for x, n in zip(run.settings, counts, strict=True)]
    torch.manual_seed(run.seed * _APART + epoch)
    batches = [
        part[rows.to(device)]
        for x, part in zip(run.settings, data, strict=True)
        for rows in torch.randperm(len(part)).split(training.rows(x))
    ]
    model.train()
    total = 0.0
    for step, which in enumerate(torch.randperm(len(batches)).tolist()):
        at = ((epoch - 1) * len(batches) + step) / (training.epochs * len(batches))
        for group in optimizer.param_groups:
            group["lr"] = run.lr * (1 + math.cos(math.pi * at)) / 2
        part = batches[which]
        loss = cross_entropy(model(part).flatten(0, 1), part.answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        if not math.isfinite(total):
            break
    return total / len(batches)


def _data(run: Run, setting: Setting, training: Training, number: int, count: int, device: str) -> Examples:
    """The sequences of an epoch, the same for all mixers; number 0 is the test."""
    seed = run.seed * _APART + number
    made = setting.draw(count, vocabulary=training.vocabulary, filler=training.filler, seed=seed)
    return made.to(device)
