"""The implementations that "auto" takes first, by the number of keys of a call."""

from __future__ import annotations

# Ascending: from so many keys on, the implementation of each operation that is named.
Faster = tuple[tuple[int, dict[str, str]], ...]


def at_length(faster: Faster, keys: int) -> dict[str, str] | None:
    """What of ``faster`` holds for a number of keys; None where nothing was measured at so few."""
    found = None
    for length, by_op in faster:
        if length <= keys:
            found = by_op
    return found
