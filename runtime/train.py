"""farspan.train: learn a method's weights on a text of the user, on a frozen model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..attention.checks import refuse_unknown
from ..attention.errors import FarspanError
from ..attention.method import AttentionMethod
from ..attention.spec import parse_method
from . import hf
from .compress.encoders import names_encoder
from .recipe import Recipe
from .training.blended import LEARNING_RATE, Blended
from .training.contrastive import Contrastive
from .training.distilled import Distilled
from .training.loop import Schedule, Step, run
from .training.objective import Objective
from .training.tuned import Tuned
from .training.windows import cut_windows

_GIVEN = ("model", "method", "start", "tune")
LEARNING_RATES = {None: 1e-3, "lora": 1e-4, "attention": 2e-5}


def train(
    model: Any,
    tokenizer: Any,
    method: str | AttentionMethod,
    text: str,
    *,
    out: str | Path,
    steps: int = 200,
    window: int = 4096,
    windows: int | None = None,
    batch: int = 1,
    lr: float | None = None,
    warmup: int = 20,
    held_out: int = 4,
    save_every: int = 20,
    seed: int = 0,
    precision: str = "no",
    tune: str | None = None,
    start: Recipe | str | Path | None = None,
    half: bool = False,
    keep: int = 16 << 30,
    progress: Callable[[Step], None] | None = None,
    **tuning: Any,
) -> Recipe:
    """Train ``method`` on ``text`` and save its recipe to the folder ``out``, for ``patch(recipe=out)``.

    Without ``tune``, the method's gates learn where the attention of the frozen model lies, one pass of the
    model for all layers; duo's alphas learn from passkeys in the text, see ``Blended``. tune="lora" trains
    adapters on the attention's projections while the method runs, tune="attention" the projections
    themselves; ``tuning`` are the options of ``Tuned`` (rank, loss).

    The method "retriever" or "hierarchical" is no attention: it trains the encoder of that name, for
    ``compress(scorer=out)``, see ``Contrastive``.

    steps: of the optimizer, each on ``batch`` windows of ``window`` tokens. windows: how many windows of
    the text are used, at most; steps beyond them use them again. The model then reads each once, for a
    method that can keep what it has observed (``observes``), which makes many steps cheap. keep: bytes of
    memory for that; windows beyond them are read again at each step. lr: 1e-3 for
    gates, 2e-2 for duo, 1e-4 for LoRA, 2e-5 for attention. held_out: windows that are measured before and
    after, and not trained on. save_every: steps between checkpoints; the same call goes on from the last one
    and ends at the same weights. precision: "no", "bf16" or "fp16". start: a recipe whose weights training
    begins with. half: save the recipe in float16, half the size. Under torchrun or accelerate launch, the
    windows of a step are spread over the processes.

    Raises FarspanError for options out of range, for a method that has nothing to train, for a ``start``
    that does not fit, for a text too short for one window and those held out, for a folder that cannot be
    written or that holds another training, and for a loss that is not finite; the last checkpoint is kept
    then.
    """
    if tune not in LEARNING_RATES:
        raise FarspanError(f"tune is 'lora' or 'attention', or left out for gates; got {tune!r}.")
    if tune is None and tuning:
        raise FarspanError(f"{', '.join(tuning)} belongs to tune='lora' or 'attention': leave it out.")
    begin = Recipe.load(start) if isinstance(start, str | Path) else start
    spec, usual, make = _teaches(model, tokenizer, method, begin, tune, tuning)
    schedule = Schedule(
        steps=steps,
        batch=batch,
        lr=usual if lr is None else lr,
        warmup=warmup,
        save_every=save_every,
        seed=seed,
        precision=precision,
    )
    check_length(model, window)
    cut = cut_windows(tokenizer, text, window, held_out, windows)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            objective = make()
        if isinstance(objective, Distilled) and steps * batch > len(cut.train):
            objective.keep = keep
        try:
            settings = {
                "spec": spec,
                "tune": tune,
                "model": hf.inspect_model(model).geometry,
                "start": None if begin is None else begin.digest,
                "windows": len(cut.train),
                "held_out_windows": held_out,
                **objective.settings,
            }
            return run(objective, cut, schedule, out, settings, progress, half=half)
        finally:
            objective.close()
    finally:
        for module, mode in modes.items():
            module.training = mode


def _teaches(
    model: Any,
    tokenizer: Any,
    method: str | AttentionMethod,
    start: Recipe | None,
    tune: str | None,
    tuning: dict[str, Any],
) -> tuple[str, float, Callable[[], Objective]]:
    """-> (the spec of what is trained, its usual learning rate, what makes its objective)."""
    if isinstance(method, str) and names_encoder(method):
        if tune is not None:
            raise FarspanError(f"tune={tune!r} is for methods of attention, not for {method}: leave it out.")
        return method, LEARNING_RATES[None], lambda: Contrastive(model, tokenizer, method, start)
    learns = parse_method(method)
    if tune is not None:
        known = [name for name in inspect.signature(Tuned).parameters if name not in _GIVEN]
        refuse_unknown("train", tuning, known, "with tune it also takes")
        return str(learns), LEARNING_RATES[tune], lambda: Tuned(model, learns, start, tune=tune, **tuning)
    if learns.blends:
        return str(learns), LEARNING_RATE, lambda: Blended(model, tokenizer, learns, start)
    if not learns.trains:
        raise FarspanError(
            f"{learns.name} has no gate that learns by distillation: give tune='lora' to train adapters "
            "under it, or a method that has one (farspan methods lists them)."
        )
    return str(learns), LEARNING_RATES[None], lambda: Distilled(model, tokenizer, learns, start)


def check_length(model: Any, window: int) -> None:
    """Raise FarspanError for windows longer than the model's positions."""
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and window > most:
        raise FarspanError(
            f"A window of {window} tokens is longer than the model's {most} positions: give a shorter window."
        )
