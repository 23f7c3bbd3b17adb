"""Offline calibration: compute the tensors that a method needs for a model, on a text of the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..attention.calibration.protocol import Calibration, GradientCalibration
from ..attention.checks import refuse_unknown
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
    """Calibrate ``method`` on the first ``tokens`` tokens of ``text``, in windows of ``window`` tokens.

    options: those of the method's ``calibration``. double_sparsity ranks channels (by=), sale finds
    thresholds (error=, start=), act chooses heads (sure=), duo takes none.
    progress: called as ``progress(done, total)``, in tokens, after each window.

    Returns a Recipe with tensors ``layers.<i>.<name>``. Raises FarspanError for a method that has no
    calibration, for options that it does not take, for tokens or window below 64, and for a text of fewer
    than 64 tokens.
    """
    learns = parse_method(method)
    if tokens < 64 or window < 64:
        raise FarspanError(
            f"Calibration needs windows of at least 64 tokens; got tokens={tokens}, window={window}. Give at "
            "least 64 for both."
        )
    info = hf.inspect_model(model)
    if info.weights_mesh is not None:
        raise FarspanError(
            "The heads of this model are sharded by tensor parallelism: calibrate the whole model in one "
            "process, and pass the recipe on all ranks."
        )
    _check_options(learns, options)
    layers = {i: learns.calibration(info.layer_info(i), **options) for i in info.attention}
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    if ids.shape[1] < 64:
        raise FarspanError(
            f"The calibration text has {ids.shape[1]} tokens; at least 64 are needed. Give a longer text."
        )
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
    """Raise FarspanError for options that the calibration of ``method`` does not have."""
    parameters = inspect.signature(method.calibration).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return  # the calibration checks them
    takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    refuse_unknown(f"The calibration of {method.name}", options, takes, "it takes")


@contextmanager
def _observed(info: hf.ModelInfo, layers: Mapping[int, Calibration]) -> Iterator[None]:
    """Pass the tensors of every attention call of a layer to the layer's calibration."""
    undo = [hf.observe(info, i, layer.needs, layer.observe) for i, layer in layers.items()]
    try:
        yield
    finally:
        for step in undo:
            step()
