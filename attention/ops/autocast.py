"""Functions that compute in the dtypes of their inputs, also where autocast is on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with autocast off on the device of its first tensor. Autocast would compute products of
    float32 logits and states in half precision."""

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        kind = next(x.device.type for x in (*args, *named.values()) if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*args, **named)
        with torch.autocast(kind, enabled=False):
            return function(*args, **named)

    return run
