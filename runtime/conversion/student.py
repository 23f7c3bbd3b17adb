"""A model whose attention layers can run their mixers instead, and change back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ...attention.errors import FarspanError, SpecError, Unsupported
from ...attention.hybrid.mixer import Mixer
from ...attention.hybrid.registry import parse_mixer
from .. import hf
from ..models.sentences import sentence_of


class Student:
    """A frozen model, and a mixer in float32 for each of some layers, with the weights of their attention.

    spec: of the mixers. seed: of their weights that the attention does not give. precision: "bf16" or "fp16"
    computes their products in that type, "no" in float32.

    The model is frozen, and in evaluation mode, until ``close``. Raises SpecError for a spec that is unknown
    or does not fit the heads of a layer, and Unsupported for attention that a mixer cannot start from.
    """

    def __init__(
        self, model: Any, spec: str, layers: Iterable[int], *, seed: int = 0, precision: str = "no"
    ) -> None:
        self.model, self.spec, self.precision = model, spec, precision
        self.info = hf.inspect_model(model)
        self.mixers: dict[int, Mixer] = {}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for index in layers:
                self.mixers[index] = self._make(index)
        self._undo = [partial(setattr, m, "training", m.training) for m in model.modules()]
        self._undo += [partial(p.requires_grad_, p.requires_grad) for p in model.parameters()]
        model.eval().requires_grad_(False)
        self.head = hf.Head(model, self.info)

    def _make(self, index: int) -> Mixer:
        geometry = hf.geometry_of(self.info, index)
        try:
            mixer = parse_mixer(self.spec, geometry)
        except SpecError as error:
            raise SpecError(f"Layer {index} cannot get the mixer {self.spec!r}: {error}") from error
        mixer.initialise_from(hf.attention_weights(self.info, index))
        hf.place_beside(mixer, self.info.attention[index])
        return mixer.float()

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @contextmanager
    def mixed(self, layers: Iterable[int]) -> Iterator[None]:
        """A context in which these layers run their mixers."""
        undo = hf.stand_in(self.info, {index: self.mixers[index] for index in layers})
        try:
            yield
        finally:
            for step in reversed(undo):
                step()

    def autocast(self) -> Any:
        """The context of calls in ``precision``."""
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return torch.autocast(
            self.device.type, types.get(self.precision, torch.bfloat16), enabled=self.precision in types
        )

    def close(self) -> None:
        """Leave the model as it was."""
        while self._undo:
            self._undo.pop()()


def candidates(info: hf.ModelInfo) -> list[int]:
    """The layers that can be converted: those with full attention. Layers with a window of their own keep
    few keys anyway."""
    return [index for index in info.attention if info.kinds[index] == hf.FULL]


def check_text_model(info: hf.ModelInfo) -> None:
    """Raise an error for a model that cannot be converted as a whole."""
    if hf.is_patched(info.model):
        raise FarspanError("This model is patched: call remove() on the patch, then convert it.")
    if len(candidates(info)) < 2:
        raise Unsupported(
            f"farspan cannot convert a {type(info.model).__name__}",
            ["fewer than 2 of its layers have full attention, and one must keep it"],
        )
    hf.converted_config(info, {})
    hf.check_by_trial(info)
    generation = getattr(info.model, "generation_config", None)
    if generation is not None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                generation.save_pretrained(folder)
        except ValueError as error:
            raise FarspanError(
                f"The model's generation_config cannot be saved ({sentence_of(error)}): correct it, then "
                "convert the model."
            ) from error


def parameters_of(modules: Mapping[int, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of modules by ``<layer>.<name>``."""
    return {f"{i}.{name}": p for i, module in modules.items() for name, p in module.named_parameters()}
