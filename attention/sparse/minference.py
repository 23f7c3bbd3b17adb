"""Budgets of single heads from a file in MInference's format."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FarspanError
from ..method import LayerInfo

_LARGEST = 2**31 - 1  # budget


def head_budgets(path: str, layer: LayerInfo, default: tuple[int, int]) -> Tensor:
    """[H, 2] int64: (vertical, slash) of each query head of ``layer``; ``default`` for a head that the file
    does not name. Raises FarspanError for a file of another model."""
    layers = load_budgets(path)
    if layer.index >= len(layers):
        raise FarspanError(
            f"{path} has budgets for {len(layers)} layers and none for layer {layer.index}: it was made for "
            "another model."
        )
    heads, count = layers[layer.index], layer.num_heads * layer.tp_size
    if any(head >= count for head in heads):
        raise FarspanError(
            f"{path} has budgets for more than the {count} query heads of layer {layer.index}: it was made "
            "for another model."
        )
    return layer.own(torch.tensor([heads.get(head, default) for head in range(count)]))


def load_budgets(path: str) -> list[dict[int, tuple[int, int]]]:
    """(vertical, slash) of each query head of each layer, from a file in MInference's format: a list with one
    object per layer, each of query heads as in {"0": ["vertical_and_slash", 1000, 6096, 1]}. A file that has
    changed is read again. Raises FarspanError."""
    try:
        about = Path(path).stat()
    except OSError as error:
        raise FarspanError(f"{path} is no file of MInference's patterns: {error.strerror}.") from error
    return _read(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int) -> list[dict[int, tuple[int, int]]]:
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FarspanError(f"{path} is no file of MInference's patterns: {error}.") from error
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise FarspanError(
            f"{path} is no file of MInference's patterns: that is a list with one object per layer, each of "
            'query heads as in {"0": ["vertical_and_slash", 1000, 6096, 1]}.'
        )
    found = [
        {_head(path, i, head): _budgets(path, i, head, entry) for head, entry in layer.items()}
        for i, layer in enumerate(layers)
    ]
    if not any(found):
        raise FarspanError(f"{path} has budgets for no head; take the file of a search, or leave config out.")
    return found


def _head(path: str, layer: int, head: str) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,5}", head):
        raise FarspanError(f"{path} numbers query heads 0, 1, ... in each layer; layer {layer} has {head!r}.")
    return int(head)


def _budgets(path: str, layer: int, head: str, entry: Any) -> tuple[int, int]:
    if isinstance(entry, list) and entry and isinstance(entry[0], str) and entry[0] != "vertical_and_slash":
        raise FarspanError(
            f"{path} gives head {head} of layer {layer} the pattern {entry[0]}; vertical_slash serves "
            "vertical_and_slash alone."
        )
    match entry:
        case [str(), int(vertical), int(slash), *_] if _whole(vertical) and _whole(slash):
            return vertical, slash
    raise FarspanError(
        f'A head has ["vertical_and_slash", VERTICAL, SLASH, ...] in {path}, both whole numbers from 1 to '
        f"{_LARGEST}; head {head} of layer {layer} has {json.dumps(entry)[:60]}."
    )


def _whole(number: int) -> bool:
    return type(number) is int and 1 <= number <= _LARGEST
