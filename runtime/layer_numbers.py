"""Options of ``patch`` that name layers by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from ..attention.checks import whole_number
from ..attention.errors import SpecError

T = TypeVar("T")


def by_layer(option: str, given: Mapping[int, T], count: int) -> dict[int, tuple[object, T]]:
    """The entries of ``option``, a mapping by layer number, by layer from 0 on: (the caller's number, value).

    Negative numbers count from the last of the ``count`` layers. Raises SpecError for a layer that does not
    exist and for one that is named twice.
    """
    found: dict[int, tuple[object, T]] = {}
    for name, value in given.items():
        number = whole_number(name)
        if number is None or not -count <= number < count:
            raise SpecError(f"{option}= takes layer numbers from 0 to {count - 1}; got {name!r}.")
        index = number % count
        if index in found:
            raise SpecError(
                f"{option}= names layer {index} twice, as {found[index][0]!r} and {name!r}: name it once."
            )
        found[index] = name, value
    return found
