"""Numbers as people type them: 4096, 128K or 1M tokens; 80G of memory."""

from __future__ import annotations

import re
from fractions import Fraction

from ..attention.errors import FarspanError

MOST = 1 << 40  # tokens; a larger number is taken for a typing error
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_AMOUNT = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)([kmgt]?)", re.IGNORECASE)


def whole(text: str, option: str) -> int:
    """A whole number from 1 to 1T, such as tokens: "4096", "128K" (131,072), "1.5K", "1M".

    Raises FarspanError, which names the option, for any other text.
    """
    number = _amount(text)
    if number is None or number.denominator != 1 or not 1 <= number <= MOST:
        raise FarspanError(
            f"{option} takes a whole number from 1 to 1T such as 4096, 128K or 1M; got {text!r}."
        )
    return int(number)


def size(text: str, option: str) -> int:
    """A number of bytes: "80G" and "80GiB" are 80 * 2**30.

    Raises FarspanError, which names the option, for any other text.
    """
    number = _amount(re.sub(r"(?<=[kmgt])i?b$", "", text.strip(), flags=re.IGNORECASE))
    if number is None or not 1 <= round(number) <= MOST**2:
        raise FarspanError(f"{option} takes a size from 1 byte on such as 80G or 1.5T; got {text!r}.")
    return round(number)


def _amount(text: str) -> Fraction | None:
    """A number, or one with K, M, G or T (each 1024 times the one before); None for any other text."""
    match = _AMOUNT.fullmatch(text.strip())
    return None if match is None else Fraction(match[1]) * 1024 ** _POWERS[match[2].lower()]
