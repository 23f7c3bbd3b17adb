"""Modules that are trained by what the whole model makes of them: the loss is at its last hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...attention.kv import KV
from ...attention.method import AttentionMethod
from ...attention.softmax import Softmax
from .. import hf
from ..patch import patch
from ..recipe import Recipe
from .layers import layers_to_train
from .passkeys import Passkeys

SPARSITY = 0.05  # the weight of mean |alpha|
LEARNING_RATE = 2e-2


class Blended:
    """The modules of a method that ``blends``, trained on passkeys (an ``Objective``; DuoAttention,
    2410.10819).

    Up to 10 passkeys of 32 tokens are hidden in each window of the text, and repeated at its end. Every layer
    attends by the method's ``blended``, with parameters kept between 0 and 1. The loss is the mean square
    difference to the dense model's last hidden states at the repeated tokens, and 0.05 times the mean of the
    parameters. The model is frozen.
    Departures: all windows have one length, where the paper's have 1K to 32K tokens; passkeys are tokens of
    the text, not words of a list; the learning rate falls by the loop's cosine, where the paper's rises and
    falls linearly in the first and the last fifth of its 2,000 steps; ``recent`` and ``sinks`` are the
    method's, where the paper trains with 128 sinks and runs with 64.

    Raises FarspanError for a window that is too short for a passkey.
    """

    def __init__(
        self, model: Any, tokenizer: Any, method: AttentionMethod, start: Recipe | None = None
    ) -> None:
        self._info = hf.inspect_model(model)
        self._model, self._method, self._hide = model, method, Passkeys(tokenizer)
        self._made = layers_to_train(self._info, method, start)
        self._undo: list[Callable[[], Any]] = [patch(model, "dense").remove]
        for p in model.parameters():
            self._undo.append(partial(p.requires_grad_, p.requires_grad))
            p.requires_grad_(False)
        self._head = hf.Head(model, self._info)

    @property
    def device(self) -> torch.device:
        return torch.device(self._model.device)

    @property
    def settings(self) -> dict[str, Any]:
        return {"sparsity": SPARSITY}

    def parameters(self) -> list[nn.Parameter]:
        return [p for module in self._modules().values() for p in module.parameters()]

    def state(self) -> dict[str, Tensor]:
        modules = self._modules().items()
        return {f"layers.{i}.{name}": x for i, module in modules for name, x in module.state_dict().items()}

    def backward(self, ids: Tensor, accelerator: Any) -> Tensor:
        seed = int(torch.randint(1 << 31, ()))
        with torch.enable_grad():
            difference, size = self._run(ids, seed)
            loss = difference + SPARSITY * size
            accelerator.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, ids: Tensor) -> dict[str, float]:
        """The "loss", the mean square "difference" of hidden states in it, and the mean "alpha"."""
        difference, size = (x.item() for x in self._run(ids, int(ids.sum())))
        return {"loss": difference + SPARSITY * size, "difference": difference, "alpha": size}

    def recipe(self, settings: dict[str, Any]) -> Recipe:
        self._clamp()
        return Recipe.of_modules(self._method, self._modules(), self._info.geometry, settings)

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _modules(self) -> dict[int, nn.Module]:
        return {index: made.module for index, made in self._made.items() if made.module is not None}

    @torch.no_grad()
    def _clamp(self) -> None:
        for p in self.parameters():
            p.clamp_(0, 1)

    def _run(self, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The mean square difference of the last hidden states at the answers of the passkeys that ``seed``
        draws for ids [B, T], and the mean parameter."""
        self._clamp()
        hidden = self._hide(ids.to(self.device), torch.Generator().manual_seed(seed))
        with torch.no_grad():
            dense = self._head.hidden(hidden.ids).last_hidden_state[hidden.answers]
        with self._blending():
            got = self._head.hidden(hidden.ids).last_hidden_state[hidden.answers]
        size = torch.cat([p.to(got.device).flatten() for p in self.parameters()]).abs().mean()
        wide = torch.promote_types(got.dtype, torch.float32)
        return (got.to(wide) - dense.to(wide)).square().mean(), size

    @contextmanager
    def _blending(self) -> Iterator[None]:
        undo = [
            hf.replace_attention(self._info.attention[index], partial(_attend, made))
            for index, made in self._made.items()
        ]
        try:
            yield
        finally:
            for step in undo:
                step()


def _attend(
    method: AttentionMethod, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax: Softmax
) -> Tensor:
    """The blended attention [B, T, H, D] of windows without padding, computed again in the backward pass."""

    def blend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return method.blended(q, KV(k, v), softmax).to(q.dtype)

    out: Tensor = checkpoint(blend, q, k, v, use_reentrant=False)
    return out.transpose(1, 2).contiguous()
