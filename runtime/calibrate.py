"""Offline calibration: a method learns of a model's layers what it needs, on text the user names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..attention.calibration.protocol import Calibration, GradientCalibration
from ..attention.errors import FarspanError
from ..attention.method import AttentionMethod
from ..attention.spec import parse_method
from . import hf
from .gradient_calibration import read_with_gradients
from .patch import patch
from .recipe import Recipe


def calibrate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    method: str | AttentionMethod = "double_sparsity",
    tokens: int = 4096,
    window: int = 2048,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Recipe:
    """Let ``method`` learn from the first ``tokens`` tokens of ``text``, in windows of ``window`` tokens.

    What it learns, and what ``options`` it takes, is its own: double_sparsity ranks channels (by=), sale
    finds thresholds (error=, start=), act chooses heads (sure=); see their ``calibration``.
    ``progress(done, total)`` is called after each window.

    Returns a Recipe with ``layers.<i>.<name>`` tensors. Raises FarspanError for a method that is not
    calibrated, for options it does not take, and for a text that is too short to learn from (under 64
    tokens).
    """
    learns = parse_method(method)
    if tokens < 64 or window < 64:
        raise FarspanError(
            f"Calibration needs at least 64 tokens in a window; got tokens={tokens}, window={window}."
        )
    info = hf.inspect_model(model)
    if info.weights_mesh is not None:
        raise FarspanError(
            "A model is calibrated before its heads are shared out by tensor parallelism: calibrate it "
            "whole, and give all ranks the recipe."
        )
    _check_options(learns, options)
    layers = {i: learns.calibration(info.layer_info(i), **options) for i in info.attention}
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    if ids.shape[1] < 64:
        raise FarspanError(f"The calibration text has {ids.shape[1]} tokens; at least 64 are needed.")
    total = ids.shape[1]
    pieces = [ids[:, a : a + window].to(model.device) for a in range(0, total, window)]

    def done(count: int) -> None:
        if progress is not None:
            progress(min(count * window, total), total)

    graded = {i: layer for i, layer in layers.items() if isinstance(layer, GradientCalibration)}
    with patch(model, "dense"):
        if graded:
            read_with_gradients(model, info, graded, [x for x in pieces if x.shape[1] >= 64], done)
        else:
            with torch.no_grad(), _observed(info, layers):
                for i, piece in enumerate(pieces):
                    model(piece, use_cache=False, logits_to_keep=1)
                    done(i + 1)
    tensors = {f"layers.{i}.{name}": x for i, layer in layers.items() for name, x in layer.weights().items()}
    settings = next(iter(layers.values())).settings
    settings = {**settings, "tokens": total, "window": window, "torch": torch.__version__}
    return Recipe(method=learns.name, geometry=info.geometry, settings=settings, tensors=tensors)


def _check_options(method: AttentionMethod, options: Mapping[str, Any]) -> None:
    """Raises FarspanError for options that the calibration of ``method`` does not have."""
    parameters = inspect.signature(method.calibration).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return  # it looks at them itself
    takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in options if name not in takes]
    if unknown:
        lacks = " and no option ".join(f"{name}=" for name in unknown)
        raise FarspanError(
            f"The calibration of {method.name} has no option {lacks}; it takes "
            f"{', '.join(f'{name}=' for name in takes) or 'none'}."
        )


@contextmanager
def _observed(info: hf.ModelInfo, layers: Mapping[int, Calibration]) -> Iterator[None]:
    """Let each layer's calibration see every call of its attention."""
    undo = [hf.observe(info, i, layer.needs, layer.observe) for i, layer in layers.items()]
    try:
        yield
    finally:
        for step in undo:
            step()
