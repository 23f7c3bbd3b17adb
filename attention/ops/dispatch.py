"""Choosing an implementation by name; nothing falls back silently."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import Unsupported
from ..kv import KV

Run = Callable[..., Any]
Impls = Mapping[str, Run]
OWN = ("reference", "eager", "triton")  # the implementations that are farspan's; others are libraries
_ran: ContextVar[set[tuple[str, str]] | None] = ContextVar("farspan_implementations", default=None)
_taken: ContextVar[set[str] | None] = ContextVar("farspan_backends", default=None)  # of the running operation
_faster: ContextVar[Mapping[str, str] | None] = ContextVar("farspan_faster", default=None)
_explained: ContextVar[list[Explained] | None] = ContextVar("farspan_explained", default=None)


class Explained(NamedTuple):
    """How an operation would be run on its arguments: by which implementation "auto" would run it where no
    library is named as faster, and the reasons against each of its implementations (none: it can run
    them)."""

    op: str
    auto: str
    reasons: dict[str, list[str]]


class LazyImpl:
    """An implementation in the module ``module`` of an op's package, imported when it is first asked for.

    The module holds the function ``name`` and ``unsupported``, which takes the same arguments and lists why
    they cannot be served (an empty list: they can).
    """

    def __init__(self, package: str | None, name: str, module: str = "triton"):
        self._place, self._name = f"{package}.{module}", name
        self._loaded: Any = None

    @property
    def _module(self) -> Any:
        if self._loaded is None:
            self._loaded = importlib.import_module(self._place)
        return self._loaded

    def unsupported(self, *args: Any, **how: Any) -> list[str]:
        away = [x.elsewhere for x in args if isinstance(x, KV) and x.elsewhere is not None]
        if away:
            return [f"the keys and values lie in {away[0]} memory, not on the device of the queries"]
        if self._place.endswith(".triton"):
            if self._loaded is None and importlib.util.find_spec("triton") is None:
                return ["triton is not installed"]
            from . import launch

            if reasons := launch.cannot_launch(args[0].device):
                return reasons
        return self._module.unsupported(*args, **how)

    def better_eager(self, *args: Any, **how: Any) -> bool:
        """Whether "auto" should leave these arguments to eager torch: the module's ``better_eager``, if
        any."""
        asked = getattr(self._module, "better_eager", None)
        return asked is not None and asked(*args, **how)

    def __call__(self, *args: Any, **how: Any) -> Any:
        return getattr(self._module, self._name)(*args, **how)


def run(op: str, impls: Impls, impl: str, *args: Any, **how: Any) -> Any:
    """``op`` on its arguments (the first is a tensor) by the implementation ``impl``.

    "auto" is the library that ``implementations`` names as faster. Where that cannot serve the arguments, it
    is triton on CUDA where it serves them better than torch, and eager torch elsewhere.
    Raises Unsupported, with the reasons, for an implementation that there is not or that cannot serve these
    arguments.
    """
    explained = _explained.get()
    if explained is not None:
        explained.append(_explain(op, impls, args, how))
    if impl != "auto":
        if impl not in impls:
            raise Unsupported(
                f"{op} has no implementation {impl!r}", [f"it has {', '.join(sorted(impls))} and auto"]
            )
        chosen = impls[impl]
        if isinstance(chosen, LazyImpl) and (reasons := chosen.unsupported(*args, **how)):
            raise Unsupported(f"The {impl} implementation of {op} cannot run this", reasons)
        return _run(op, impls, impl, args, how)
    faster = _faster.get()
    if faster is not None and _serves(impls, faster.get(op), args, how):
        with suppress(Unsupported):
            return _run(op, impls, faster[op], args, how)
    return _run(op, impls, _own(impls, args, how), args, how)


def _run(op: str, impls: Impls, impl: str, args: tuple[Any, ...], how: dict[str, Any]) -> Any:
    names: set[str] = set()
    if isinstance(impls[impl], LazyImpl):
        with torch.cuda.device_of(args[0]):  # its kernels are launched on the current device
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
    if seen is not None:  # not before: what raises Unsupported has not run
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


def _serves(impls: Impls, name: str | None, args: tuple[Any, ...], how: dict[str, Any]) -> bool:
    """Whether "auto" may take the implementation ``name``."""
    chosen = None if name is None else impls.get(name)
    return isinstance(chosen, LazyImpl) and not (
        chosen.unsupported(*args, **how) or chosen.better_eager(*args, **how)
    )


def _own(impls: Impls, args: tuple[Any, ...], how: dict[str, Any]) -> str:
    """The implementation of farspan's own that "auto" takes."""
    return "triton" if args[0].device.type == "cuda" and _serves(impls, "triton", args, how) else "eager"


def _explain(op: str, impls: Impls, args: tuple[Any, ...], how: dict[str, Any]) -> Explained:
    reasons = {}
    for name, chosen in impls.items():
        reasons[name] = chosen.unsupported(*args, **how) if isinstance(chosen, LazyImpl) else []
        if isinstance(chosen, LazyImpl) and not reasons[name] and chosen.better_eager(*args, **how):
            reasons[name] = ["eager torch serves such arguments better"]
    return Explained(op, _own(impls, args, how), reasons)


@contextmanager
def implementations(faster: Mapping[str, str] | None = None) -> Iterator[set[tuple[str, str]]]:
    """The (operation, implementation) pairs that run inside. faster: by operation, the implementation that
    "auto" takes first inside."""
    seen: set[tuple[str, str]] = set()
    ran, taken = _ran.set(seen), _taken.set(None)  # not those of an operation that runs outside
    wanted = _faster.set(faster) if faster else None
    try:
        yield seen
    finally:
        if wanted is not None:
            _faster.reset(wanted)
        _taken.reset(taken)
        _ran.reset(ran)


@contextmanager
def explanations() -> Iterator[list[Explained]]:
    """How "auto" would run each operation that is called inside."""
    explained: list[Explained] = []
    token = _explained.set(explained)
    try:
        yield explained
    finally:
        _explained.reset(token)


def check_qkv(op: str, q: Tensor, kv: KV, start: Tensor | None) -> None:
    """Refuse shapes that do not belong together: q [B, H, Tq, D], kv of keys [B, Hkv, Tk, D] and values
    [B, Hkv, Tk, Dv], start [B]."""
    if not isinstance(kv, KV):
        raise TypeError(f"{op} takes keys and values as one KV(k, v); got a {type(kv).__name__}.")
    if q.dim() != 4 or kv.stored[0].dim() != 4:
        sizes = ", ".join(f"{x.dim()}-D" for x in (q, *kv.stored))
        raise ValueError(f"{op} takes q [B, H, Tq, D] and k, v [B, Hkv, Tk, D]; got {sizes}.")
    shape = kv.shape
    if not (q.shape[0] == shape[0] and q.shape[3] == kv.head_dim and kv.aligned):
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
