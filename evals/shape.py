"""Check that JSON from a file has the shape that its readers need."""

from __future__ import annotations

import json
from types import NoneType
from typing import Any

Shape = type | tuple[type, ...] | list[Any] | dict[Any, Any]
"""A type, or a tuple of types; `[shape]`: a list of such items; `{name: shape}`: an object with these fields
(others are ignored, a missing one counts as null); `{str: shape}`: an object whose values all have the
shape."""

NUMBER = (int, float)
MAYBE_NUMBER = (int, float, NoneType)


def misfit(value: Any, shape: Shape, name: str) -> str | None:
    """The first fault, such as `score is "high"`; None if the value has the shape. A boolean is not a
    number."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{name} is {short(value, 40)}"
        if str in shape:
            parts = [(str(field), item, shape[str]) for field, item in value.items()]
        else:
            parts = [(field, value.get(field), expected) for field, expected in shape.items()]
    elif isinstance(shape, list):
        if not isinstance(value, list):
            return f"{name} is {short(value, 40)}"
        parts = [(name, item, shape[0]) for item in value]
    else:
        fits = isinstance(value, shape) and not isinstance(value, bool)
        return None if fits else f"{name} is {short(value, 40)}"
    return next((found for part in parts if (found := misfit(part[1], part[2], part[0]))), None)


def fill(value: Any, shape: Shape) -> None:
    """Write null into the fields of ``shape`` that ``value``, which has the shape, lacks."""
    if isinstance(shape, dict) and str not in shape:
        for field, expected in shape.items():
            fill(value.setdefault(field, None), expected)


def short(value: Any, most: int) -> str:
    """The value as JSON, cut to `most` characters."""
    text = json.dumps(value)
    return text if len(text) <= most else text[: most - 3] + "..."
