"""farspan.convert: replace attention layers of a pretrained model by mixers, and heal it by distillation."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..attention.errors import FarspanError
from . import hf
from .conversion.align import ABOUT, Aligned, taken_alignment
from .conversion.card import REPORT, memory, write_report
from .conversion.choose import (
    AUTO,
    EVEN,
    Measured,
    keep_choice,
    keep_json,
    measure,
    most_needed,
    parse_layers,
)
from .conversion.heal import Healed, check_healing
from .conversion.probe import ProbeText, probe_texts, retrieval_loss
from .conversion.student import Student, candidates, check_text_model
from .models import positions
from .train import check_length
from .training.loop import Schedule, Step, optimise
from .training.objective import Trained
from .training.windows import Windows, cut_windows
from .writable import check_writable

WORK = "conversion"  # the folder inside ``out`` with the checkpoints, until the model is saved
MEASURED = 2  # held-out windows on which the replacement of each layer is measured


def convert(
    model: Any,
    tokenizer: Any,
    mixer: str,
    text: str,
    *,
    out: str | Path,
    attention_layers: str | Sequence[int] = "auto:8",
    steps_align: int = 200,
    steps_heal: int = 400,
    window: int = 512,
    windows: int | None = None,
    batch: int = 1,
    lr_align: float = 1e-3,
    lr: float = 3e-4,
    train: str = "mixers",
    cross_entropy: float = 0.0,
    held_out: int = 4,
    save_every: int = 50,
    seed: int = 0,
    precision: str = "auto",
    aligned: str | Path | None = None,
    keep: bool = False,
    progress: Callable[[str, Step], None] | None = None,
    chosen: Callable[[list[Measured], list[int]], None] | None = None,
) -> dict[str, Any]:
    """Convert ``model`` and save the result to the new folder ``out``, for ``farspan.load(out)``.

    Every converted layer gets the mixer of the spec ``mixer``, such as "gated_linear", with the weights of
    the layer's own projections. Stage 1 teaches each mixer the output of its layer's attention, one pass of
    the model for all layers. Then the layers that keep their attention are chosen. Stage 2 teaches the
    converted model the next-token distributions of the original. ``model`` itself does not change.

    attention_layers: which layers keep attention. "auto:N": the N whose replacement alone costs the most, by
    the divergence on held-out text and by the loss on values to look up in a synthetic text. "even:N": evenly
    spaced. Or a list of layer numbers.
    steps_align, steps_heal: steps of the two stages, each on ``batch`` windows of ``window`` tokens of
    ``text``. windows: how many windows are used, at most. lr_align, lr: the highest learning rates.
    train: what stage 2 changes: "mixers", or "all" weights of the decoder's layers. cross_entropy: the weight
    of the text's own loss beside the distillation. held_out: windows that are measured and not trained on.
    save_every: steps between checkpoints. The same call goes on where it was stopped, and ends at the same
    weights. precision: "no", "bf16" or "fp16"; "auto": the dtype of the model.
    aligned: the folder of another conversion of this model with this mixer, whose stage 1 and measurements
    are used instead of new ones: for other layers, or another stage 2. keep: leave the checkpoints in
    ``out``/conversion, which ``aligned`` needs; without it they are removed at the end.
    progress: called with "align", "choose" or "heal" and a Step. chosen: called with what was measured and
    the layers that keep attention.

    Returns what was measured, which is also in ``out``: conversion.json, and README.md in words. It holds no
    claim beyond these numbers; without both stages a converted model is much worse than the original.

    Raises SpecError for a mixer that is unknown or does not fit the heads, Unsupported for a model that
    cannot be converted, and FarspanError for layers out of range, a text too short, a folder that holds
    something else or cannot be written, and for a loss that is not finite.
    """
    info = hf.inspect_model(model)
    check_text_model(info)
    can = candidates(info)
    kept = parse_layers(attention_layers, can, len(info.kinds))
    folder = check_folder(Path(out))
    check_healing(train, cross_entropy)
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "no")
    precision = kind if precision == "auto" else precision
    shared: dict[str, Any] = {"batch": batch, "save_every": save_every, "seed": seed, "precision": precision}
    plans = {
        "align": Schedule(steps=steps_align, lr=lr_align, **shared),
        "heal": Schedule(steps=steps_heal, lr=lr, **shared),
    }
    check_length(model, window)
    run = _Run(folder, plans, cut_windows(tokenizer, text, window, held_out, windows), progress)
    layers = can if isinstance(kept, int) else [i for i in can if i not in kept]
    student = Student(model, mixer, layers, seed=seed, precision=precision)
    try:
        hf.empty_converted(info, dict.fromkeys(layers, mixer))
        settings = {"mixer": mixer, "model": info.geometry, "layers": layers, "held_out_windows": held_out}
        probe = probe_texts(tokenizer, seed=seed, positions=positions(model))
        if aligned is None:
            run.align(student, settings)
        else:
            run.take(student, Path(aligned), settings)
        if isinstance(kept, int):
            found = run.choose(student, probe)
            kept = most_needed(found, kept)
            if chosen is not None:
                chosen(found, kept)
        replaced = [i for i in can if i not in kept]
        student.mixers = {i: student.mixers[i] for i in replaced}
        looked_up = {"original": retrieval_loss(student, probe, [])}
        looked_up["aligned"] = retrieval_loss(student, probe, replaced)
        healed = Healed(student, replaced, trains=train, cross_entropy=cross_entropy)
        try:
            more = {**settings, **healed.settings, "steps_align": steps_align, "lr_align": lr_align}
            run.heal(healed, more)
            healed.finish()
            looked_up["converted"] = retrieval_loss(student, probe, replaced)
            after = run.judge(healed)
            report = {
                "base": _name(model),
                "mixer": mixer,
                "layers": len(info.kinds),
                "attention_layers": [i for i in info.attention if i not in replaced],
                "replaced": replaced,
                "how_chosen": _how(attention_layers),
                "stages": run.stages,
                "retrieval": looked_up,
                "after": after,
                "memory": _memory(student),
                "text": f"{len(text):,} characters",
                "versions": {name: version(name) for name in ("farspan", "torch", "transformers")},
            }
            with _disk_errors(folder):
                hf.save_converted(info, student.mixers, mixer, folder)
                if hasattr(tokenizer, "save_pretrained"):
                    tokenizer.save_pretrained(folder)
                write_report(folder, report)
        finally:
            healed.close()
    finally:
        student.close()
    if not keep:
        shutil.rmtree(folder / WORK, ignore_errors=True)
    return report


class _Run:
    """The stages of one conversion, and what each measured."""

    def __init__(
        self,
        folder: Path,
        plans: dict[str, Schedule],
        windows: Windows,
        progress: Callable[[str, Step], None] | None,
    ) -> None:
        self.folder, self.plans, self.windows = folder / WORK, plans, windows
        self.progress = progress or (lambda stage, step: None)
        self.stages: dict[str, Any] = {}

    def align(self, student: Student, settings: dict[str, Any]) -> None:
        """Stage 1."""
        self._train("align", Aligned(student), {**settings, **Aligned.settings})

    def take(self, student: Student, other: Path, settings: dict[str, Any]) -> None:
        """Stage 1 of another conversion."""
        made = taken_alignment(other / WORK, student, settings)
        self.stages["align"] = made["about"]
        if made["choice"] is not None:
            keep_choice(self.folder, lambda: made["choice"])

    def choose(self, student: Student, probe: list[ProbeText]) -> list[Measured]:
        """What it costs to replace each layer alone. It is measured once, also when the run is resumed."""

        def make() -> dict[str, Any]:
            done = partial(self.progress, "choose")
            count = lambda at, of: done(Step(at, of, math.nan, math.nan))  # noqa: E731
            errors = self.stages["align"]["held_out"][-1]
            held_out = self.windows.held_out[:MEASURED]
            return {"measured": [asdict(m) for m in measure(student, held_out, probe, errors, count)]}

        made = keep_choice(self.folder, make)
        self.stages["choose"] = made["measured"]
        return [Measured(**m) for m in made["measured"]]

    def heal(self, healed: Healed, settings: dict[str, Any]) -> None:
        """Stage 2."""
        self._train("heal", healed, settings)

    def judge(self, healed: Healed) -> dict[str, float]:
        """The measures of the held-out windows."""
        found = [healed.evaluate(window[None]) for window in self.windows.held_out]
        return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

    def _train(self, stage: str, trained: Trained, settings: dict[str, Any]) -> None:
        given = {**settings, "windows": len(self.windows.train)}
        watch = partial(self.progress, stage)
        made = optimise(trained, self.windows, self.plans[stage], self.folder / stage, given, watch)
        self.stages[stage] = made
        keep_json(self.folder / stage / ABOUT, made)


def check_folder(folder: Path) -> Path:
    """Raise FarspanError unless the folder is new, empty, or holds a conversion that has not ended; and under
    a launcher of several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FarspanError("A model is converted in one process: start it without torchrun.")
    check_writable(folder, "give another folder")
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ended = WORK not in inside or REPORT in inside  # the report is written last
    if inside - {WORK} and ended:
        what = "a model" if "config.json" in inside else f"{min(inside - {WORK})}"
        raise FarspanError(
            f"{folder} exists and holds {what}: give a new folder, or one with an unfinished conversion."
        )
    return folder


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        for path in folder.iterdir():  # half a model would look like a whole one
            if path.name != WORK:
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        raise FarspanError(
            f"The converted model could not be written to {folder} ({error}); its training is kept there. "
            "Free some space and give the same command again to go on."
        ) from error


def _memory(student: Student) -> dict[str, int | None]:
    size, info = student.model.dtype.itemsize, student.info
    tokens = {}
    for index in candidates(info):
        layer = info.layer_info(index)
        tokens[index] = 2 * layer.num_kv_heads * layer.head_dim * size
    return memory(tokens, student.mixers)


def _how(given: str | Sequence[int]) -> str:
    if isinstance(given, str) and given.startswith(AUTO):
        return "chosen by measurement"
    return "evenly spaced" if isinstance(given, str) and given.startswith(EVEN) else "as given"


def _name(model: Any) -> str:
    """The name of a model, without folders of this machine."""
    return Path(getattr(model.config, "name_or_path", "") or type(model).__name__).name
