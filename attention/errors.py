"""The errors a user can cause. Each message says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class FarspanError(ValueError):
    """Base of every error that bad input causes; its text is one sentence for the user."""


class SpecError(FarspanError):
    """A method specification that names no method, or gives a parameter a value it cannot take."""


class Unsupported(FarspanError):
    """Something farspan cannot serve. ``reasons`` lists why, one clause each."""

    def __init__(self, what: str, reasons: Iterable[str]):
        self.what = what
        self.reasons = list(reasons)
        super().__init__(f"{what}: {'; '.join(self.reasons)}.")

    def __reduce__(self) -> tuple[type[Unsupported], tuple[str, list[str]]]:
        return type(self), (self.what, self.reasons)
