"""Nested values with tensors in them, as plain values for JSON and tensors by name.

What a store holds is such a value: numbers, texts, lists, tuples, sets, mappings, dtypes, devices, tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...attention.errors import FarspanError


def split(value: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """-> (``value`` for JSON, its tensors by names that begin with ``name``). A device is left out, since the
    value may be joined on another one. Raises FarspanError for a value of an unknown kind."""
    tensors: dict[str, Tensor] = {}

    def plain(x: Any) -> Any:
        if isinstance(x, Tensor):
            tensors[f"{name}.{len(tensors)}"] = x
            return {"tensor": f"{name}.{len(tensors) - 1}"}
        if x is None or isinstance(x, bool | int | float | str):
            return x
        if isinstance(x, list):
            return [plain(item) for item in x]
        if isinstance(x, tuple):
            return {"tuple": [plain(item) for item in x]}
        if isinstance(x, frozenset):
            return {"set": sorted(x)}
        if isinstance(x, Mapping):
            return {"items": [[plain(key), plain(item)] for key, item in x.items()]}
        if isinstance(x, torch.dtype):
            return {"dtype": str(x).removeprefix("torch.")}
        if isinstance(x, torch.device):
            return {"device": None}
        raise FarspanError(
            f"This cache cannot be saved, because it holds a {type(x).__name__} ({name}): save a cache of "
            "keys, values and states alone."
        )

    return plain(value), tensors


def bytes_of(value: Any) -> int:
    """Bytes of the tensors in a value."""
    if isinstance(value, Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(bytes_of, items))


def copied(value: Any) -> Any:
    """A value with copies of its tensors, which do not keep memory that these are views of."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, list | tuple) else value


def joined(plain: Any, tensor: Callable[[str], Tensor], device: torch.device) -> Any:
    """The value that ``split`` has taken apart. tensor: returns the tensor of a name. device: takes the place
    of a device that was left out."""
    if isinstance(plain, list):
        return [joined(item, tensor, device) for item in plain]
    if not isinstance(plain, dict):
        return plain
    [(kind, x)] = plain.items()
    match kind:
        case "tensor":
            return tensor(x).to(device)
        case "tuple":
            return tuple(joined(x, tensor, device))
        case "set":
            return frozenset(x)
        case "items":
            return dict(joined(x, tensor, device))
        case "dtype":
            return getattr(torch, x)
        case "device":
            return device
    raise FarspanError(f"A saved cache has a value of the unknown kind {kind!r}: build the cache again.")
