"""Tensors that are used after the call that makes them, also in inference mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def lasting() -> Iterator[None]:
    """A context for tensors that are used after the call. It makes no inference tensors, since these cannot
    be updated outside inference mode."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def runs_lasting(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which runs in the context ``lasting``. Outside inference mode that costs nothing."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with lasting():
            return function(*args, **kwargs)

    return run
