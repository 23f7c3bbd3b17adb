"""The hooks and replaced forwards that a patch puts on modules. They cannot be copied or pickled."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..session import Unique


class Hook(Unique):
    """A function of a patch that a module holds. Copying or pickling the module raises FarspanError."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


def replace_forward(module: Any, forward: Callable[..., Any]) -> Callable[[], None]:
    """Replace the forward of ``module`` by ``forward(original, *args, **kwargs)``. Returns the undo step."""
    original, replaced = module.forward, "forward" in vars(module)
    stand_in: Any = Hook(lambda *args, **kwargs: forward(original, *args, **kwargs))
    stand_in.__signature__ = inspect.signature(original)
    module.forward = stand_in

    def restore() -> None:
        if replaced:
            module.forward = original
        else:
            del module.forward

    return restore
