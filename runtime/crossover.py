"""The crossovers that `tune` has measured: the lengths from which a method is faster than dense attention.

They are saved in a file and read again. A measurement holds for one device with its number of threads, one
version of torch, one dtype and one geometry.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..attention.checks import whole_number
from ..attention.errors import FarspanError
from ..attention.method import AttentionMethod, LayerInfo
from .machine import device_name
from .models import cache_folder
from .writable import check_writable


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measured times of one method in one phase.

    layer: num_heads, num_kv_heads and head_dim. lengths: numbers of keys. dense, seconds: at each length, the
    seconds of dense attention and of the method.
    """

    method: str
    phase: str
    layer: dict[str, int]
    lengths: list[int]
    dense: list[float]
    seconds: list[float]

    @property
    def crossover(self) -> int | None:
        """The smallest measured length from which the method is faster at every measured length; None where
        there is none."""
        found = None
        for length, dense, seconds in zip(self.lengths, self.dense, self.seconds, strict=True):
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
        try:
            crossover = Measured(**entry).crossover
        except TypeError:
            text = f"{_file()} holds no crossovers: delete it and run 'farspan tune' again."
            raise FarspanError(text) from None
        found[phase] = math.inf if crossover is None else float(crossover)
    return found


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
    made_with = f"farspan {version('farspan')}, torch {torch.__version__}"
    return " | ".join((device_name(model.device), made_with, _dtype(model), sizes, phase, spec))


def _file() -> Path:
    return cache_folder() / "crossover.json"


def _read() -> dict[str, Any]:
    path = _file()
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
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
