"""Choosing an implementation by name; nothing falls back silently."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..errors import Unsupported
from ..kv import KV

Run = Callable[..., Any]
Impls = Mapping[str, Run]
_ran: ContextVar[set[tuple[str, str]] | None] = ContextVar("farspan_implementations", default=None)
_taken: ContextVar[set[str] | None] = ContextVar("farspan_backends", default=None)  # of the running operation


class LazyImpl:
    """An implementation in the module ``module`` of an op's package, imported when it is first asked for.

    The module holds the function ``name`` and ``unsupported``, which takes the same arguments and lists why
    they cannot be served (an empty list: they can).
    """

    def __init__(self, package: str | None, name: str, module: str = "triton"):
        self._place, self._name = f"{package}.{module}", name

    def unsupported(self, *args: Any, **how: Any) -> list[str]:
        if self._place.endswith(".triton"):
            if importlib.util.find_spec("triton") is None:
                return ["triton is not installed"]
            from . import launch

            if reasons := launch.cannot_launch(args[0].device):
                return reasons
        return importlib.import_module(self._place).unsupported(*args, **how)

    def better_eager(self, *args: Any, **how: Any) -> bool:
        """Whether "auto" should leave these arguments to eager torch: the module's ``better_eager``, if
        any."""
        asked = getattr(importlib.import_module(self._place), "better_eager", None)
        return asked is not None and asked(*args, **how)

    def __call__(self, *args: Any, **how: Any) -> Any:
        return getattr(importlib.import_module(self._place), self._name)(*args, **how)


def run(op: str, impls: Impls, impl: str, *args: Any, **how: Any) -> Any:
    """``op`` on its arguments (the first is a tensor) by the implementation ``impl``.

    "auto" is triton on CUDA where it serves the arguments better than torch, and eager torch elsewhere.
    Raises Unsupported, with the reasons, for an implementation that there is not or that cannot serve these
    arguments.
    """
    if impl == "auto":
        triton = impls.get("triton") if args[0].device.type == "cuda" else None
        served = isinstance(triton, LazyImpl) and not (
            triton.unsupported(*args, **how) or triton.better_eager(*args, **how)
        )
        impl = "triton" if served else "eager"
    elif impl not in impls:
        raise Unsupported(
            f"{op} has no implementation {impl!r}", [f"it has {', '.join(sorted(impls))} and auto"]
        )
    else:
        chosen = impls[impl]
        if isinstance(chosen, LazyImpl) and (reasons := chosen.unsupported(*args, **how)):
            raise Unsupported(f"The {impl} implementation of {op} cannot run this", reasons)
    return _run(op, impls, impl, args, how)


def _run(op: str, impls: Impls, impl: str, args: tuple[Any, ...], how: dict[str, Any]) -> Any:
    names: set[str] = set()
    if impl == "triton":
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            result = impls[impl](*args, **how)
    elif impl == "eager" and args[0].device.type == "cuda":  # named after torch's kernels that it takes
        token = _taken.set(names)
        try:
            result = impls[impl](*args, **how)
        finally:
            _taken.reset(token)
    else:
        result = impls[impl](*args, **how)
    seen = _ran.get()
    if seen is not None:
        seen.update((op, name) for name in names or (impl,))
    return result


def took(backend: str) -> None:
    """Note that attention on CUDA is computed by ``backend``, one of ``backends.choose``: for the operation
    that runs, or for "attend" where none does."""
    backends, seen = _taken.get(), _ran.get()
    if backends is not None:
        backends.add(backend)
    elif seen is not None:
        seen.add(("attend", backend))


@contextmanager
def implementations() -> Iterator[set[tuple[str, str]]]:
    """The (operation, implementation) pairs that run inside. The implementation of an operation that attends
    by torch's kernels on CUDA is the kernel's name, such as "cudnn" (``backends.choose``)."""
    seen: set[tuple[str, str]] = set()
    ran, taken = _ran.set(seen), _taken.set(None)  # not those of an operation that runs outside
    try:
        yield seen
    finally:
        _ran.reset(ran)
        _taken.reset(taken)


def check_qkv(op: str, q: Tensor, kv: KV, start: Tensor | None) -> None:
    """Refuse shapes that do not belong together: q [B, H, Tq, D], kv of keys [B, Hkv, Tk, D] and values
    [B, Hkv, Tk, Dv], start [B]."""
    if not isinstance(kv, KV):
        raise TypeError(f"{op} takes keys and values as one KV(k, v); got a {type(kv).__name__}.")
    for x in (q, *kv.stored):
        if x.dim() != 4:
            sizes = ", ".join(f"{x.dim()}-D" for x in (q, *kv.stored))
            raise ValueError(f"{op} takes q [B, H, Tq, D] and k, v [B, Hkv, Tk, D]; got {sizes}.")
    shape = kv.shape
    fits = q.shape[0] == shape[0] and q.shape[3] == kv.head_dim
    for x in kv.stored:
        fits = fits and x.shape[:3] == shape
    if not fits:
        raise ValueError(f"{op} got q {list(q.shape)} and {kv}, which do not fit together.")
    if not q.dtype == kv.dtype == kv.value_dtype:
        raise ValueError(
            f"{op} takes q, k and v of one dtype; got {q.dtype}, {kv.dtype} and {kv.value_dtype}."
        )
    if q.shape[1] % shape[1]:
        raise ValueError(
            f"{op} needs a whole number of query heads per KV head; got {q.shape[1]} and {shape[1]}."
        )
    if start is not None and start.shape != (q.shape[0],):
        raise ValueError(
            f"{op} takes start [B] = [{q.shape[0]}], each row's first valid position; got "
            f"{list(start.shape)}."
        )
