"""Checks of numbers and fields that users give."""

from __future__ import annotations

import math
import operator
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import FarspanError, SpecError
from .method import AttentionMethod


def whole_number(value: Any) -> int | None:
    """``value`` as an int, whether it is Python's, NumPy's or a tensor of one number; None where it is not a
    whole number. Truth values of any library are not numbers."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


_HINTS: dict[type, dict[str, Any]] = {}


def type_hints(cls: type) -> dict[str, Any]:
    """``typing.get_type_hints``, which evaluates every annotation anew at each call, kept for each class."""
    if cls not in _HINTS:
        _HINTS[cls] = typing.get_type_hints(cls)
    return _HINTS[cls]


def require(method: AttentionMethod, **limits: tuple[float, float | None] | tuple[str, ...]) -> None:
    """Check fields of a method against (lowest, highest or None) or a tuple of allowed strings. A field that
    is None passes; a whole number of NumPy or torch becomes an int.

    Raises SpecError, which says what is allowed.
    """
    hints = type_hints(type(method))
    for key, allowed in limits.items():
        value = getattr(method, key)
        if value is None:
            continue
        if isinstance(allowed[0], str):
            if value not in allowed:
                raise SpecError(
                    f"{method.name} takes {key} = {' or '.join(map(str, allowed))}; got {value!r}."
                )
            continue
        low, high = allowed
        kinds = typing.get_args(hints[key]) or (hints[key],)
        if (whole := whole_number(value)) is not None:
            value = whole
            object.__setattr__(method, key, whole)
        number = isinstance(value, int | float if float in kinds else int) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"from {low} to {high}"
            what = "" if float in kinds else "a whole number, "
            raise SpecError(f"{method.name} takes {key} {what}{bound}; got {value!r}.")


def refuse_unknown(what: str, options: Iterable[str], takes: Sequence[str], words: str) -> None:
    """Raise FarspanError for names in ``options`` that are not in ``takes``. The sentence begins with
    ``what`` and ends with ``words`` and the names that there are."""
    unknown = [name for name in options if name not in takes]
    if unknown:
        lacks = " and no option ".join(f"{name}=" for name in unknown)
        there = ", ".join(f"{name}=" for name in takes) or "none"
        raise FarspanError(f"{what} has no option {lacks}; {words} {there}.")
