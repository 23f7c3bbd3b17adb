"""Whole numbers, however they are given: Python's own, NumPy's, or a tensor of one."""

from __future__ import annotations

import operator
from typing import Any


def whole_number(value: Any) -> int | None:
    """``value`` as an int; None where it is no whole number. Truth values are none, of whatever library."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None
