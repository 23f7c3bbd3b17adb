"""Record for which positions a call of the model returns logits (``logits_to_keep``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..session import Session
from .hooks import Hook


def watch_logits(model: nn.Module, decoder: nn.Module, session: Session) -> list[Callable[[], None]]:
    """Set ``session.logits_to_keep`` and ``session.scoring`` in each call of the modules around the decoder,
    from their argument ``logits_to_keep``. A decoder that is called directly returns hidden states, so that
    nothing is scored. Returns the undo steps."""
    undo: list[Callable[[], None]] = []
    path = next((name for name, module in model.named_modules() if module is decoder), "").split(".")
    for depth in range(len(path)):
        module = model.get_submodule(".".join(path[:depth]))
        signature = inspect.signature(module.forward)
        if "logits_to_keep" in signature.parameters:
            undo += _watch(module, signature, session)
    return undo


def _watch(owner: nn.Module, signature: inspect.Signature, session: Session) -> list[Callable[[], None]]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        count = given.get("logits_to_keep", 0)
        session.logits_to_keep = count if isinstance(count, int) and count > 0 else None
        session.scoring = session.logits_to_keep != 1

    def after(*_: Any) -> None:
        session.logits_to_keep, session.scoring = None, False

    return [
        owner.register_forward_pre_hook(Hook(before), with_kwargs=True).remove,
        owner.register_forward_hook(Hook(after), always_call=True).remove,
    ]
