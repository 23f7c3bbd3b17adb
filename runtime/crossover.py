"""What `tune` has measured: the lengths from which a method is faster than dense attention (crossovers), and
from which another library's kernels are faster in it than farspan's.

Measurements are saved in a file and read again. One holds for one device with its number of threads, one
version of torch, one dtype and one geometry.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..attention.checks import whole_number
from ..attention.errors import FarspanError
from ..attention.method import AttentionMethod, LayerInfo
from .faster import Faster
from .machine import device_name
from .models import cache_folder
from .writable import check_writable

_CLEARLY = 0.95  # a library's kernels are taken where they need at most this share of the time

_version = functools.cache(version)  # which reads a file; a key is made for each layer and phase


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measured times of one method in one phase.

    layer: num_heads, num_kv_heads and head_dim. lengths: numbers of keys. dense, seconds: at each length, the
    seconds of dense attention and of the method. rivals: by operation and implementation, the seconds of the
    method at each length with another library's kernels for that operation; None where they did not run.
    """

    method: str
    phase: str
    layer: dict[str, int]
    lengths: list[int]
    dense: list[float]
    seconds: list[float]
    rivals: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)

    @property
    def faster(self) -> Faster:
        """From each measured length on, the fastest library of each operation, where it is faster than
        farspan's own kernels."""
        found = tuple((length, self._taken(at)) for at, length in enumerate(self.lengths))
        return found if any(by_op for _, by_op in found) else ()

    @property
    def taken(self) -> list[float]:
        """At each length, the seconds of the method with the fastest of these libraries."""
        return [
            min([own, *(self.rivals[op][name][at] or own for op, name in self._taken(at).items())])
            for at, own in enumerate(self.seconds)
        ]

    def _taken(self, at: int) -> dict[str, str]:
        found = {}
        for op, impls in self.rivals.items():
            times = {name: by_length[at] or math.inf for name, by_length in impls.items()}
            name = min(times, key=times.__getitem__)
            if times[name] <= _CLEARLY * self.seconds[at]:
                found[op] = name
        return found

    @property
    def crossover(self) -> int | None:
        """The smallest measured length from which the method is faster at every measured length; None where
        there is none."""
        found = None
        for length, dense, seconds in zip(self.lengths, self.dense, self.taken, strict=True):
            if seconds >= dense:
                found = None
            elif found is None:
                found = length
        return found


def crossovers(
    methods: Mapping[str, AttentionMethod], layer: LayerInfo, model: Any, setting: int | str | None
) -> dict[str, float]:
    """By phase, the number of keys from which the method of the layer is used. setting: ``crossover`` of
    ``patch``.

    Raises FarspanError for a setting that is not allowed, and for "auto" where nothing was measured.
    """
    if setting is None:
        return {}
    selective = {phase: method for phase, method in methods.items() if method.selective}
    number = whole_number(setting)
    if number is not None and number >= 1:
        return dict.fromkeys(selective, float(number))
    if not isinstance(setting, str) or setting != "auto":
        raise FarspanError(f'crossover is "auto" or a number of keys, at least 1; got {setting!r}.')
    kept = _read()
    found = {}
    for phase, method in selective.items():
        entry = kept.get(_key(str(method), phase, geometry(layer), model))
        if entry is None:
            shape = f"{layer.num_heads}/{layer.num_kv_heads} heads of {layer.head_dim} in {_dtype(model)}"
            raise FarspanError(
                f'crossover="auto" was given, but {method} in {phase} was never measured on '
                f"{device_name(model.device)} for {shape}: run 'farspan tune --methods \"{method}\"' with "
                "this model, or give a number."
            )
        crossover = _measured(entry).crossover
        found[phase] = math.inf if crossover is None else float(crossover)
    return found


def faster_kernels(
    served: Mapping[int, Mapping[str, AttentionMethod]], layer_of: Callable[[int], LayerInfo], model: Any
) -> dict[int, dict[str, Faster]]:
    """By layer and phase, the libraries that ``tune`` has measured faster than farspan's kernels in the
    method.

    served: the methods of each layer, by phase. Nothing is measured for layers that are missing in the
    result. Raises FarspanError where the file of measurements cannot be read.
    """
    kept = _read()
    found: dict[int, dict[str, Faster]] = {}
    for index, methods in served.items() if kept else ():
        for phase, method in methods.items():
            entry = kept.get(_key(str(method), phase, geometry(layer_of(index)), model))
            if entry is not None and (faster := _measured(entry).faster):
                found.setdefault(index, {})[phase] = faster
    return found


def _measured(entry: Any) -> Measured:
    try:
        found = Measured(**entry)
        _ = found.faster, found.crossover  # which read all of it
        return found
    except (TypeError, AttributeError, IndexError, ValueError):
        text = f"{_file()} holds no crossovers: delete it and run 'farspan tune' again."
        raise FarspanError(text) from None


def geometry(layer: LayerInfo) -> dict[str, int]:
    """The sizes that times depend on."""
    return {
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
    }


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _key(spec: str, phase: str, geometry: dict[str, int], model: Any) -> str:
    sizes = "x".join(map(str, geometry.values()))
    made_with = f"farspan {_version('farspan')}, torch {torch.__version__}"
    return " | ".join((device_name(model.device), made_with, _dtype(model), sizes, phase, spec))


def _file() -> Path:
    return cache_folder() / "crossover.json"


def _read() -> dict[str, Any]:
    path = _file()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise FarspanError(
            f"{path} cannot be read ({error}): delete it and run 'farspan tune' again."
        ) from None
    if not isinstance(kept, dict):
        raise FarspanError(f"{path} holds no crossovers: delete it and run 'farspan tune' again.")
    return kept


def check_kept() -> None:
    """Raise FarspanError where the file in the user's cache folder cannot be read or written."""
    check_writable(_file().parent, "set FARSPAN_CACHE to a folder that can be written")
    _read()


def keep(measured: list[Measured], model: Any) -> Path:
    """Add the measurements to the file in the user's cache folder and return its path. A lock keeps those of
    processes that do this at the same time."""
    from filelock import FileLock

    path = _file()
    new = {_key(m.method, m.phase, m.layer, model): asdict(m) for m in measured}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            text = json.dumps(_read() | new, indent=1)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as out:
                out.write(text)
            os.replace(out.name, path)
    except OSError as error:
        raise FarspanError(
            f"The crossovers cannot be saved in {path.parent} ({error.strerror}): set FARSPAN_CACHE to a "
            "folder that can be written."
        ) from None
    return path
