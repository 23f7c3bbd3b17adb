"""The training loop: one for gates, adapters and attention weights, on one device or several."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ...attention.errors import FarspanError
from ..recipe import Recipe
from ..writable import check_writable
from .checkpoint import FILE, load_checkpoint, save_checkpoint
from .objective import Objective, Trained
from .windows import Windows

LOG = "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast training runs.

    steps: of the optimizer. batch: windows of a step, over all processes. lr: the highest learning rate,
    reached after ``warmup`` steps, at most a tenth of all; from there it falls to 0 by a cosine. save_every:
    steps between checkpoints. precision: "no", "bf16" or "fp16", of accelerate's autocast.
    """

    steps: int
    batch: int = 1
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    save_every: int = 20
    seed: int = 0
    precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every"):
            if getattr(self, name) < 1:
                raise FarspanError(f"{name} is at least 1; got {getattr(self, name)}.")
        if not (0 < self.lr < math.inf):
            raise FarspanError(f"lr is a finite number above 0; got {self.lr}.")
        if self.precision not in ("no", "bf16", "fp16"):
            raise FarspanError(f"precision is no, bf16 or fp16; got {self.precision!r}.")

    def factor(self, step: int) -> float:
        """The share of ``lr`` at a step."""
        warmup = min(self.warmup, max(self.steps // 10, 1))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.steps - warmup, 1)))


@dataclass(frozen=True)
class Step:
    """One step of a training, for a progress bar. done: steps so far, of ``total``. tokens_per_second: since
    this process began, over all processes."""

    done: int
    total: int
    loss: float
    tokens_per_second: float


def run(
    objective: Objective,
    windows: Windows,
    schedule: Schedule,
    out: str | Path,
    settings: dict[str, Any],
    progress: Callable[[Step], None] | None = None,
    *,
    half: bool = False,
) -> Recipe:
    """Train ``objective`` by ``optimise``, save its recipe to the folder ``out``, and return it. half: save
    the recipe's weights in float16."""
    recipe = objective.recipe(optimise(objective, windows, schedule, out, settings, progress))
    recipe = recipe.half() if half else recipe
    from accelerate import PartialState

    processes = PartialState()
    if processes.is_main_process:
        recipe.save(out)
    processes.wait_for_everyone()
    return recipe.full()


def optimise(
    objective: Trained,
    windows: Windows,
    schedule: Schedule,
    out: str | Path,
    settings: dict[str, Any],
    progress: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Train ``objective`` on windows of a text. Returns the settings, and what was measured.

    The folder ``out`` gets ``checkpoint.pt`` and ``log.jsonl``. Where it holds a checkpoint of the same
    settings, training goes on from there and ends at the same weights as without a stop. settings: what else
    the result depends on. Raises FarspanError for a folder that cannot be written or that holds another
    training, and for a loss that is not finite.
    """
    from accelerate import Accelerator

    folder = Path(out)
    check_writable(folder, "give another folder")
    given = {**settings, **asdict(schedule), "window": windows.size, "text_sha256": windows.sha256}
    on_cpu = torch.device(objective.device).type == "cpu"
    try:
        accelerator = Accelerator(mixed_precision=schedule.precision, cpu=on_cpu)
    except ValueError as error:
        raise FarspanError(
            f"accelerate runs in this process already, with another precision or device ({error}): train in "
            "a process of its own, or with that precision."
        ) from error
    if schedule.batch % accelerator.num_processes:
        raise FarspanError(
            f"A step of {schedule.batch} windows does not divide by the {accelerator.num_processes} "
            "processes: give a batch that does."
        )
    training = _Training(objective, windows, schedule, accelerator)
    before = load_checkpoint(folder, given)
    if before is not None:
        training.restore(before)
    training.check_together(folder)
    if accelerator.is_main_process:
        _cut_log(folder, training.step)

    def save() -> None:
        if accelerator.is_main_process:
            save_checkpoint(folder, {**training.content(), "settings": given})
        accelerator.wait_for_everyone()

    if not training.held_out:
        training.judge()
    begun, first = time.monotonic(), training.step
    while training.step < schedule.steps:
        loss = training.advance(folder)
        spent = max(time.monotonic() - begun, 1e-9)
        rate = (training.step - first) * schedule.batch * windows.size / spent
        if accelerator.is_main_process:
            _log(folder, {"step": training.step, "loss": loss, "tokens_per_second": round(rate, 1)})
            if progress is not None:
                progress(Step(training.step, schedule.steps, loss, rate))
        if training.step == schedule.steps:
            training.judge()
            training.check_finite(folder)
        if training.step % schedule.save_every == 0 or training.step == schedule.steps:
            training.seconds += time.monotonic() - training.since
            training.since = time.monotonic()
            save()
    about = {**given, "held_out": training.held_out, "minutes": round(training.seconds / 60, 1)}
    return {**about, "processes": accelerator.num_processes, "torch": torch.__version__}


class _Training:
    """The state of a training between two steps."""

    def __init__(self, objective: Trained, windows: Windows, schedule: Schedule, accelerator: Any) -> None:
        self.objective, self.windows, self.schedule, self.accelerator = (
            objective,
            windows,
            schedule,
            accelerator,
        )
        optimizer = AdamW(objective.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay)
        self.optimizer = accelerator.prepare(optimizer)
        self.rates = LambdaLR(optimizer, schedule.factor)
        self.step, self.seconds, self.since = 0, 0.0, time.monotonic()
        self.held_out: list[dict[str, float]] = []  # measures before the first step and after the last

    def content(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "seconds": self.seconds,
            "held_out": self.held_out,
            "state": {name: x.detach().cpu().clone() for name, x in self.objective.state().items()},
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    @torch.no_grad()
    def restore(self, content: dict[str, Any]) -> None:
        """Go on from what a checkpoint has kept."""
        for name, x in self.objective.state().items():
            x.copy_(content["state"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        self.rates.load_state_dict(content["rates"])
        if content["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.step, self.seconds, self.held_out = content["step"], content["seconds"], content["held_out"]

    def judge(self) -> None:
        """Measure the held-out windows, each on one process."""
        size, rank = self.accelerator.num_processes, self.accelerator.process_index
        count = len(self.windows.held_out)
        total: dict[str, float] = {}
        for i in range(0, count, size):
            place = min(i + rank, count - 1)  # every process runs equally often, some for nothing
            for name, x in self.objective.evaluate(self.windows.held_out[place : place + 1]).items():
                total[name] = total.get(name, 0.0) + (x if i + rank < count else 0.0)
        means = self._sum(torch.tensor(list(total.values()), dtype=torch.float64)) / count
        self.held_out.append(dict(zip(total, means.tolist(), strict=True)))

    def check_finite(self, folder: Path) -> None:
        """Raise FarspanError where the last held-out measures are not finite."""
        if not all(map(math.isfinite, self.held_out[-1].values())):
            raise FarspanError(
                f"The held-out text has a loss of {self.held_out[-1]['loss']} after step {self.step}, so no "
                f"recipe was saved; {_kept(folder)} Lower the learning rate."
            )

    def check_together(self, folder: Path) -> None:
        """Raise FarspanError where the processes have checkpoints of different steps."""
        size = self.accelerator.num_processes
        total = self._sum(torch.tensor([self.step, self.step**2], dtype=torch.float64))
        if total[1] * size != total[0] ** 2:
            raise FarspanError(
                f"The processes found checkpoints of different steps in {folder}; this one is at step "
                f"{self.step}: give a folder that all processes share."
            )

    def advance(self, folder: Path) -> float:
        """Take one step. Returns its loss."""
        schedule, accelerator = self.schedule, self.accelerator
        ids = self.windows.of_step(self.step, schedule.batch, schedule.seed)
        mine = ids[accelerator.process_index :: accelerator.num_processes]
        loss = torch.zeros((), dtype=torch.float64)
        device = torch.device(self.objective.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(hash((schedule.seed, self.step, accelerator.process_index)) % (1 << 62))
            for window in mine:
                with accelerator.autocast():
                    loss += self.objective.backward(window[None], accelerator).double().cpu()
        loss = self._sum(loss[None])[0] / schedule.batch
        if not math.isfinite(loss):
            raise FarspanError(
                f"The loss of step {self.step + 1} is {loss.item()}, so training stopped; {_kept(folder)} "
                "Lower the learning rate, or take another precision."
            )
        self._share_gradients()
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), schedule.clip)
        if accelerator.scaler is None and not torch.isfinite(norm):  # a scaler leaves such a step out
            raise FarspanError(
                f"The gradient of step {self.step + 1} is not finite, so training stopped; {_kept(folder)} "
                "Lower the learning rate, or take another precision."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates.step()
        self.step += 1
        return loss.item()

    def _share_gradients(self) -> None:
        """Give every process the mean gradient over all windows of the step."""
        parameters = self.objective.parameters()
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad /= self.schedule.batch
        if self.accelerator.num_processes > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
            flat = self._sum(flat)
            at = 0
            for p in parameters:
                assert p.grad is not None
                p.grad.copy_(flat[at : at + p.numel()].view_as(p))
                at += p.numel()

    def _sum(self, x: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return x
        summed: Tensor = self.accelerator.reduce(x.to(self.accelerator.device), "sum")
        return summed.to(x.device)


def _log(folder: Path, entry: dict[str, float]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise FarspanError(
            f"{folder / LOG} could not be written ({error.strerror}); {_kept(folder)} Free some space and "
            "give the same command again to go on."
        ) from error


def _cut_log(folder: Path, step: int) -> None:
    """Drop what the log has of later steps than ``step``, and a line that a killed process left
    unfinished."""
    path, kept = folder / LOG, []
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    new = folder / (LOG + ".new")
    new.write_text("".join(kept))
    new.replace(path)


def _kept(folder: Path) -> str:
    kept = (folder / FILE).exists()
    return f"the checkpoint in {folder} is kept." if kept else "there is no checkpoint yet."
