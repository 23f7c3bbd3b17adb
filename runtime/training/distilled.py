"""Distillation: the gates of all layers learn from one dense pass of the frozen model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.keys import Keys, State
from ...attention.kv import KV
from ...attention.method import AttentionMethod
from ...attention.needs import Inputs
from ...attention.softmax import Softmax
from .. import hf
from ..patch import patch
from ..recipe import Recipe
from .layers import layers_to_train
from .sentence_ends import SentenceEnds


class Distilled:
    """The modules of ``method`` in all layers, trained by its ``distillation_loss`` (an ``Objective``).

    The model runs densely and without gradients. Each layer's loss and gradient are computed as soon as its
    queries and keys are there, so memory holds the tensors of one layer. tokenizer: of the model, for methods
    that learn from the ends of sentences. start: a recipe whose weights training begins with, in place of new
    ones.

    The attribute ``keep`` says how many bytes of what the layers observe of windows are kept in memory, so
    that the model runs once for each of these windows, however many steps it serves; 0 keeps nothing. It is
    for windows that come again, and has an effect for a method that ``observes`` alone.

    Raises FarspanError for a method that is not trained.
    """

    def __init__(
        self, model: Any, tokenizer: Any, method: AttentionMethod, start: Recipe | None = None
    ) -> None:
        info = hf.inspect_model(model)
        self._model, self._info, self._method = model, info, method
        self._made = layers_to_train(info, method, start)
        by_sentences = any(made.needs.sentence_ends for made in self._made.values())
        self._find_ends = SentenceEnds(tokenizer) if by_sentences else None
        self._ends: Tensor | None = None
        self.keep, self._bytes = 0, 0
        self._kept: dict[bytes, dict[int, State]] = {}  # by the tokens of a window, what each layer observed
        self._on_layer: Callable[[int, Tensor, Keys], None] = lambda index, q, keys: None
        self._undo = [patch(model, "dense").remove]
        try:
            for index, made in self._made.items():
                self._undo.append(hf.observe(info, index, made.needs, partial(self._observe, index)))
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> torch.device:
        return torch.device(self._model.device)

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self._modules().values() for p in module.parameters() if p.requires_grad]

    def state(self) -> dict[str, Tensor]:
        modules = self._modules().items()
        return {f"layers.{i}.{name}": x for i, module in modules for name, x in module.state_dict().items()}

    def backward(self, ids: Tensor, accelerator: Any) -> Tensor:
        losses: list[Tensor] = []

        def learn(index: int, loss: Tensor) -> None:
            accelerator.backward(loss)
            losses.append(loss.detach())

        if self.keep and self._method.observes:
            for index, seen in self._seen(ids).items():
                device = next(self._modules()[index].parameters()).device
                seen = {name: x.to(device) for name, x in seen.items()}
                learn(index, self._made[index].loss_of(seen))
        else:
            self._run(ids, lambda i, q, keys: learn(i, self._made[i].distillation_loss(q, keys)))
        return torch.stack([x.to(losses[0].device) for x in losses]).mean()

    def _seen(self, ids: Tensor) -> dict[int, State]:
        """What each layer observes of a window. The model runs when the window comes for the first time."""
        key = ids.numpy().tobytes()
        if key not in self._kept:
            found: dict[int, State] = {}

            def observe(index: int, q: Tensor, keys: Keys) -> None:
                with torch.no_grad():
                    seen = self._made[index].observed(q, keys)
                found[index] = {name: x.cpu() for name, x in seen.items()}

            self._run(ids, observe)
            size = sum(x.nbytes for seen in found.values() for x in seen.values())
            if self._bytes + size > self.keep:
                return found
            self._bytes += size
            self._kept[key] = found
        return self._kept[key]

    def evaluate(self, ids: Tensor) -> dict[str, float]:
        losses: dict[int, float] = {}

        def judge(index: int, q: Tensor, keys: Keys) -> None:
            with torch.no_grad():
                losses[index] = self._made[index].distillation_loss(q, keys).item()

        for module in self._modules().values():
            module.eval()
        self._run(ids, judge)
        for module in self._modules().values():
            module.train()
        return {"loss": sum(losses.values()) / len(losses)}

    def recipe(self, settings: dict[str, Any]) -> Recipe:
        return Recipe.of_modules(self._method, self._modules(), self._info.geometry, settings)

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _modules(self) -> dict[int, nn.Module]:
        return {index: made.module for index, made in self._made.items() if made.module is not None}

    def _run(self, ids: Tensor, on_layer: Callable[[int, Tensor, Keys], None]) -> None:
        self._on_layer = on_layer
        self._ends = None if self._find_ends is None else self._find_ends(ids).to(self.device)
        with torch.no_grad():
            self._model(ids.to(self.device), use_cache=False, logits_to_keep=1)

    def _observe(
        self, index: int, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax, *, inputs: Inputs | None = None
    ) -> None:
        if inputs is not None and self._ends is not None:
            inputs = dataclasses.replace(inputs, ends=self._ends.to(q.device))
        keys = Keys(kv=KV(k, v), tq=q.shape[2], softmax=softmax, fed=inputs)
        with torch.enable_grad():
            self._on_layer(index, q, keys)
