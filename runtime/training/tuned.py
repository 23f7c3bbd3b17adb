"""Fine-tuning: the attention's projections learn while a method runs in every layer that it serves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.checks import whole_number
from ...attention.errors import FarspanError
from ...attention.kv import KV
from ...attention.method import PREFILL, AttentionMethod
from ...attention.ops.flash import flash
from ...attention.partial import add_sinks
from ...attention.recycled import teacher_forced
from ...attention.softmax import Softmax
from .. import hf
from ..lora import TUNES, projections, replace_parameter
from ..patch import patch
from ..recipe import Recipe
from .losses import backward, divergence, logits_at, measure, nll
from .swap import Swap, place_of

LOSSES = ("kl", "nll")
_NAME = "farspan"  # of the adapters, for peft


class Tuned:
    """The projections of the layers that ``method`` serves, trained while it runs (an ``Objective``).

    Windows of a text are prefill calls, so the method selects in prefill; ``recycled``, whose prefill is
    dense, runs in the form for training that ``teacher_forced`` makes of it. All other weights are frozen.
    Gradients flow through the keys that are read, not through the choice of them. A method that selects for a
    block of queries chooses by the whole block, in training as in prefill.

    tune: "lora" trains adapters of ``rank`` (8 by default) on every linear projection of the attention
    (2106.09685, by peft; the update is alpha / rank * b a, alpha 16 by default), in float32. "attention"
    trains the projections themselves, in their own dtype; in bfloat16, steps smaller than a rounding are
    lost. loss: "kl" is the divergence KL(dense || tuned) of the next-token distributions, both at
    ``temperature``, times its square; the dense model has the weights from before training. "nll" is the
    negative log-likelihood of the text. Both are means over positions, in nats.
    start: a recipe whose adapters training begins with; a method with weights takes them from it.

    The model is changed until ``close``. Raises FarspanError for values outside those above, for a method
    that selects in no prefill or by a prompt's last queries, and Unsupported for a model whose attention has
    no linear projections or quantised ones.
    """

    def __init__(
        self,
        model: Any,
        method: AttentionMethod,
        start: Recipe | None = None,
        *,
        tune: str = "lora",
        rank: int | None = None,
        alpha: float | None = None,
        loss: str = "kl",
        temperature: float = 1.0,
    ) -> None:
        self._rank, self._alpha, self._temperature = _checked(tune, rank, alpha, loss, temperature)
        self._model, self._method, self._tune, self._loss = model, method, tune, loss
        self._info = hf.inspect_model(model)
        self._gate = start if start is not None and method.needs.recipe else None
        running = _in_training(method)
        if loss == "nll" and running.lookahead.tokens:
            warnings.warn(
                f"{method} selects by up to {running.lookahead.tokens:.0f} later tokens, so the nll "
                "of a text depends on what it predicts: take loss='kl', or a method whose lookahead is 0.",
                stacklevel=2,
            )
        gate = None if self._gate is None else self._gate.without_adapters()
        self._patched = patch(model, prefill=running, recipe=gate)
        self._undo: list[Callable[[], Any]] = [self._patched.remove]
        try:
            self._learn(start)
        except BaseException:
            self.close()
            raise

    def _learn(self, start: Recipe | None) -> None:
        """Freeze the model and put what is trained into its attention."""
        layers = self._patched.selective_layers()
        self._linear = projections(self._info, layers)
        for p in self._model.parameters():
            self._undo.append(partial(p.requires_grad_, p.requires_grad))
            p.requires_grad_(False)
        self._head = hf.Head(self._model, self._info)
        if self._tune == "lora":
            self._tensors, self._swap = self._add_lora()
        else:
            self._tensors, self._swap = self._open_weights()
        if start is not None and start.adapters:
            self._begin_with(start)
        elif start is not None and self._gate is None:
            raise FarspanError(
                f"The recipe that training starts from has no adapters, and {self._method.name} takes no "
                "weights from it: leave start out."
            )

    def _add_lora(self) -> tuple[dict[str, nn.Parameter], Swap]:
        config, inject = _peft()
        attention = {target.partition(".")[0]: None for target in self._linear}
        root = nn.ModuleDict({index: self._info.attention[int(index)] for index in attention})
        swap = Swap([place_of(root, target) for target in self._linear])
        self._undo.append(swap.original)
        inject(config(r=self._rank, lora_alpha=self._alpha, target_modules=list(self._linear)), root, _NAME)
        swap.taken()
        tensors: dict[str, nn.Parameter] = {}
        for target in self._linear:
            layer: Any = root.get_submodule(target)
            for name, inside in (("a", layer.lora_A), ("b", layer.lora_B)):
                p = inside[_NAME].weight
                p.data = p.data.float()
                tensors[f"{target}.{name}"] = p
        return tensors, swap

    def _open_weights(self) -> tuple[dict[str, nn.Parameter], Swap]:
        places = [(module, name) for module in self._linear.values() for name, _ in module.named_parameters()]
        swap = Swap(places)
        for module in self._linear.values():
            for name, p in module.named_parameters():
                self._undo.append(replace_parameter(module, name, p))
        swap.taken()
        tensors: dict[str, nn.Parameter] = {}
        for target, module in self._linear.items():
            for name, p in module.named_parameters():
                p.requires_grad_()
                tensors[f"{target}.{name}"] = p
        return tensors, swap

    @torch.no_grad()
    def _begin_with(self, start: Recipe) -> None:
        start.check_geometry(self._info.geometry, f"'farspan train {self._method.name}'")
        if start.method != self._method.name:
            raise FarspanError(
                f"The adapters that training starts from were trained under {start.method}, and this is "
                f"{self._method.name}: give the same method, or leave start out."
            )
        if start.adapters != self._about():
            had = ", ".join(f"{name}={x}" for name, x in start.adapters.items() if name != "targets")
            raise FarspanError(
                f"The recipe that training starts from has other adapters ({had}): give the same tune, rank, "
                "alpha and method, or leave start out."
            )
        for name, x in self.state().items():
            x.copy_(start.tensors[name])

    # --- the objective ------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return torch.device(self._model.device)

    @property
    def settings(self) -> dict[str, Any]:
        about = {name: x for name, x in self._about().items() if name in ("rank", "alpha")}
        return {**about, "loss": self._loss, "temperature": self._temperature}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._tensors.values())

    def state(self) -> dict[str, Tensor]:
        return {f"adapters.{name}": p.detach() for name, p in self._tensors.items()}

    def backward(self, ids: Tensor, accelerator: Any) -> Tensor:
        """See ``Objective``."""
        ids = ids.to(self.device)
        teacher = self._dense_hidden(ids) if self._loss == "kl" else None

        def loss(logits: Tensor, at: slice) -> Tensor:
            if teacher is None:
                return nll(logits, ids, at)
            with torch.no_grad():
                wanted = logits_at(self._head, teacher, teacher.last_hidden_state, ids, at)
            return divergence(wanted, logits, ids, self._temperature)

        with torch.enable_grad():
            return backward(self._head, self._head.hidden(ids), ids, loss, accelerator)

    @torch.no_grad()
    def evaluate(self, ids: Tensor) -> dict[str, float]:
        """The negative log-likelihoods (nats a token) of the tuned and of the dense model, their difference,
        KL(dense || tuned), and the "loss" that is trained."""
        ids = ids.to(self.device)
        dense, tuned = self._dense_hidden(ids), self._head.hidden(ids)
        found = measure(self._head, tuned, dense, ids, self._temperature)
        return {"loss": found[self._loss], **found}

    def recipe(self, settings: dict[str, Any]) -> Recipe:
        tensors = {name: x.cpu().clone() for name, x in self.state().items()}
        gate = None if self._gate is None else self._gate.without_adapters()
        return Recipe(
            method=self._method.name,
            geometry=self._info.geometry,
            settings=settings,
            tensors=tensors if gate is None else {**gate.tensors, **tensors},
            parameters={} if gate is None else gate.parameters,
            adapters=self._about(),
        )

    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"tune": self._tune, "targets": list(self._linear)}
        return about | ({"rank": self._rank, "alpha": self._alpha} if self._tune == "lora" else {})

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _dense_hidden(self, ids: Tensor) -> Any:
        """What the decoder returns with dense attention and the weights from before training."""
        with torch.no_grad(), self._swap.originals(), self._all_dense():
            return self._head.hidden(ids)

    @contextmanager
    def _all_dense(self) -> Iterator[None]:
        undo = [
            hf.replace_attention(self._info.attention[index], _attend_densely)
            for index in self._patched.selective_layers()
        ]
        try:
            yield
        finally:
            for step in undo:
                step()


def _attend_densely(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax: Softmax) -> Tensor:
    """Dense attention [B, T, H, D] of windows without padding."""
    part = flash(q, KV(k, v), softmax)
    if softmax.sinks is not None:
        part = add_sinks(part, softmax.sinks)
    return part.out.to(q.dtype).transpose(1, 2).contiguous()


def _in_training(method: AttentionMethod) -> AttentionMethod:
    """The prefill method that runs in training under ``method``."""
    running = teacher_forced(method) or method
    if PREFILL not in running.phases or not running.selective:
        raise FarspanError(
            f"{method} selects nothing in prefill, and training runs prefill calls: take a method that has "
            "prefill (farspan methods lists them), or recycled."
        )
    if running.lookahead.is_prompt:
        raise FarspanError(
            f"{method} selects by a prompt's last queries, so a loss over the tokens of a window depends on "
            "later tokens: train under another prefill method."
        )
    return running


def _checked(
    tune: str, rank: int | None, alpha: float | None, loss: str, temperature: float
) -> tuple[int, float, float]:
    if tune not in TUNES:
        raise FarspanError(f"tune is {' or '.join(TUNES)}; got {tune!r}.")
    if loss not in LOSSES:
        raise FarspanError(f"loss is {' or '.join(LOSSES)}; got {loss!r}.")
    if tune != "lora" and (rank is not None or alpha is not None):
        raise FarspanError(f"rank and alpha belong to tune='lora', and tune is {tune!r}: leave them out.")
    rank, alpha = 8 if rank is None else rank, 16.0 if alpha is None else alpha
    whole = whole_number(rank)
    if whole is None or whole < 1:
        raise FarspanError(f"rank is a whole number, at least 1; got {rank!r}.")
    for name, value in (("alpha", alpha), ("temperature", temperature)):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise FarspanError(f"{name} is a finite number above 0; got {value!r}.")
    return whole, float(alpha), float(temperature)


def _peft() -> tuple[Any, Any]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise FarspanError(
            "LoRA needs peft, which is not installed: pip install 'farspan[train]', or tune the attention's "
            "own weights (tune='attention')."
        ) from error
    return partial(LoraConfig, init_lora_weights=True), inject_adapter_in_model
